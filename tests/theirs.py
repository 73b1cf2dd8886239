"""What users of the other systems have: configurations and command lines, as `student-migrate` is given them."""

from __future__ import annotations

NEMO = """
distillation:
  lambda_: 0.5
  kl_type: forward
  generate_strategy: {max_length: 2048, temperature: 0.1, decoding_method: greedy}
  teacher_model_path: org/teacher-32B
  max_steps: 1000
  eval_steps: 100
  save_steps: 500
  logging_steps: 10
policy:
  model_name: org/student-1.5B
  max_total_sequence_length: 4096
  train_micro_batch_size: 2
  dynamic_batching:
    train_mb_tokens: "${mul:${..max_total_sequence_length}, ${..train_micro_batch_size}}"
  sequence_packing: {enabled: true}
  dtensor_cfg: {enabled: true, tensor_parallel_size: 2, activation_checkpointing: true}
  optimizer: {name: torch.optim.AdamW, kwargs: {lr: 2.0e-5, betas: [0.9, 0.999]}}
  scheduler:
    - {name: torch.optim.lr_scheduler.LinearLR, kwargs: {start_factor: 0.1, end_factor: 1.0, total_iters: 10}}
    - {name: torch.optim.lr_scheduler.ConstantLR, kwargs: {factor: 1.0}}
    - milestones: [10]
  generation: {backend: megatron, colocated: {enabled: true}}
data: {dataset_name: math_cl, validation: {dataset_name: openai/gsm8k, split: test}}
logger: {wandb_enabled: true, wandb: {project: distil, name: "${policy.model_name}-run"}}
checkpointing: {keep_top_k: 3, metric_name: "val:accuracy", higher_is_better: true}
cluster: {gpus_per_node: 8, num_nodes: 1}
"""
ROLL = """
exp_name: distill
seed: 42
output_dir: ./output
save_steps: 100
resume_from_checkpoint: false
student_pretrain: org/student-7B
teacher_pretrain: org/teacher-14B
logits_topk: 0
distill_loss_weight: 0.85
kd_objective: skewed_reverse_kl
skew_lambda: 0.2
adaptive_kl_alpha: 0.4
kd_temperature: 2.0
teacher_temperature: 3.0
distill_on_prompt: true
sequence_length: 2048
question_key: question_zh
answer_key: answer_zh
student:
  model_args: {dtype: bf16, disable_gradient_checkpointing: false}
  training_args:
    {learning_rate: 2.0e-5, lr_scheduler_type: cosine, per_device_train_batch_size: 8, gradient_accumulation_steps: 4,
     num_train_epochs: 1, warmup_steps: 5}
  data_args: {template: qwen2_5, file_name: [data/one.json]}
  strategy_args:
    strategy_config: {tensor_model_parallel_size: 2, use_distributed_optimizer: true}
  use_sequence_packing: true
  device_mapping: list(range(0,8))
teacher:
  strategy_args: {strategy_config: {tensor_model_parallel_size: 4}}
  device_mapping: list(range(8,12))
track_with: tensorboard
"""
LOCAL = r"""
# two GPUs
accelerate launch --config_file some/config.yaml --num_processes 2 \
  -m local_distill.train_on_policy_local \
  --student_model org/student --teacher_model org/teacher --dataset tulu3 \
  --batch_size 256 --group_size 4 --grad_accum 8 --max_new_tokens 512 --steps 7 --learning_rate 1e-4 \
  --kl_coef 0.5 --kl_discount 0.9 --use_lora --lora_r 96 --lora_alpha 48 \
  --dtype bf16 --save_every 200 --wandb_project p --wandb_name n --wandb_mode offline --teacher_ds_zero3
"""
HYBRID = r"""
nohup setsid env WANDB_API_KEY='abc123' WANDB_MODE=offline CUDA_VISIBLE_DEVICES=0,1,2,3,4 NCCL_ALGO=Ring \
torchrun --standalone --nproc_per_node=4 --master_port=29543 \
  somewhere/train_gpus.py --dtype bfloat16 --layers 14 16 17 30 --batch_size 2 --grad_accumulation_steps 3 \
  --ce_weight 1.0 --kl_weight 0.1 --temperature 2.0 --epochs 1 --max_steps 1000 --seq_length 512 \
  --freeze_mlp --freeze_replaced_layers --no_dataset_streaming --local_files_only --save_interval 100 \
  --wandb --wandb_project llamba --wandb_run_name one --output_dir out > logs/train.log 2>&1 &
"""

# -- as their guides have them, remarks and all that starts nothing left out

NEMO_PAGE = """
distillation:
  lambda: 0.9
  kl_type: "forward"
  max_length: 2048
data:
  dataset_name: "math_cl"
  prompt_template: "math_distillation"
cluster:
  enabled: true
  num_nodes: 1
  gpus_per_node: 8
"""
NEMO_BATCH = "train_mb_tokens: 16384\n"
NEMO_GUIDE = """
distillation:
  teacher_model_path: "Qwen/Qwen2.5-32B-Instruct"

  lambda_: 0.5
  kl_type: "forward"
  generate_strategy:
    max_length: 2048
    temperature: 0.1
    decoding_method: "greedy"

  max_steps: 1000
  eval_steps: 100
  save_steps: 500
  logging_steps: 10

policy:
  model_name: "Qwen/Qwen2.5-1.5B-Instruct"
  generation:
    backend: "megatron"
    colocated:
      enabled: true
"""
NEMO_PLAIN = "uv run examples/run_distillation.py --config examples/configs/distillation_math_cl.yaml"
NEMO_PYTHON = "uv run python examples/run_distillation.py --config examples/configs/distillation_math_cl.yaml"
NEMO_OVERRIDES = r"""
uv run python examples/run_distillation.py \
  --config examples/configs/distillation_math_cl.yaml \
  distillation.lambda_=0.7 \
  distillation.kl_type=reverse \
  policy.generation.backend=vllm
"""
ROLL_COMMAND = r"""
   # export PYTHONPATH=$(pwd):$PYTHONPATH

   python examples/start_distill_pipeline.py \
          --config_path examples/qwen2.5-7B-distill_megatron \
          --config_name distill_megatron
"""
ROLL_SCRIPT = r"""#!/bin/bash

CONFIG_NAME="distill_megatron"                         # distill_megatron.yaml
CONFIG_PATH="examples/qwen2.5-7B-distill_megatron"


python examples/start_distill_pipeline.py \
       --config_path $CONFIG_PATH \
       --config_name $CONFIG_NAME \
       "$@"   # and more
"""
LOCAL_TOY = r"""
python -m local_distill.train_on_policy_local \
  --student_model sshleifer/tiny-gpt2 \
  --teacher_model sshleifer/tiny-gpt2 \
  --steps 3 --batch_size 2 --max_new_tokens 16 --group_size 2
"""
LOCAL_GPUS = r"""
accelerate launch --config_file local_distill/accelerate_config_multi_gpu.yaml \
  -m local_distill.train_on_policy_local \
  --student_model Qwen/Qwen3-8B \
  --teacher_model Qwen/Qwen3-32B \
  --dataset tulu3 \
  --batch_size 256 --group_size 4 --grad_accum 8 \
  --max_new_tokens 512 --use_lora --lora_r 64 \
  --dtype bf16 --save_every 200 \
  --wandb_project onpolicy-distill --wandb_name qwen8b_tulu3
"""
LOCAL_ZERO2 = r"""
accelerate launch --config_file local_distill/accelerate_config_multi_gpu.yaml \
  --deepspeed_config_file local_distill/ds_zero2_bf16.json \
  -m local_distill.train_on_policy_local ...
"""
LOCAL_ZERO3 = r"""
accelerate launch --config_file local_distill/accelerate_config_multi_gpu.yaml \
  -m local_distill.train_on_policy_local \
  --student_model Qwen/Qwen3-8B --teacher_model Qwen/Qwen3-32B \
  --dataset tulu3 --batch_size 256 --group_size 4 --grad_accum 8 \
  --max_new_tokens 512 --use_lora --lora_r 64 --dtype bf16 \
  --teacher_ds_zero3  # or --teacher_ds_config path/to/ds_zero3_infer.json
"""
HYBRID_GPUS = r"""
nohup setsid env \
  HF_DATASETS_CACHE=DIR/cache \
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
  WANDB_API_KEY='***' \
  WANDB_MODE=offline \
  CUDA_VISIBLE_DEVICES=0,1,2,3,4 \
  NCCL_IB_DISABLE=1 \
  NCCL_ALGO=Ring \
  TORCH_DISTRIBUTED_DEBUG=DETAIL \
  OMP_NUM_THREADS=4 \
torchrun --standalone --nproc_per_node=4 --master_port=29543 \
  Gather-and-Aggregate/Hybrid_distill/train_gpus.py \
  --dtype bfloat16 \
  --layers 14 16 17 30 \
  --batch_size 2 \
  --ce_weight 1.0 \
  --kl_weight 0.1 \
  --epochs 1 \
  --max_steps 100000 \
  --seq_length 1024 \
  --freeze_mlp \
  --freeze_replaced_layers \
  --no_dataset_streaming \
  --local_files_only \
  --save_interval 1000 \
  --wandb \
  --wandb_project llamba-distill \
  --wandb_run_name 1teacher_4students1 \
  --output_dir DIR/out \
  > logs/train_gpus1.log 2>&1 &
"""
HYBRID_MMLU = r"""
CUDA_VISIBLE_DEVICES=7 \
python Gather-and-Aggregate/eval_mmlu_hybrid.py \
  --which hybrid_ft \
  --device cuda:0 \
  --dtype bfloat16 \
  --layers 14 16 17 30 \
  --ckpt DIR/out
"""
NO_TRAINING = (
    "bash tests/functional/distillation.sh",
    "bash examples/qwen2.5-7B-distill_megatron/run_distill_pipeline.sh",
    "pip install -r requirements.txt",
    "tensorboard --logdir <your_log_dir>",
)
