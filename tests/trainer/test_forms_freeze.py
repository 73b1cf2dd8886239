"""Weights that stay as they are, and models of the user's own classes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from onestep import bare_run
from pydantic import ValidationError
from test_train_gradients import samples  # noqa: F401 (a fixture)
from tinymodels import save_tiny, tiny_model

from student_trainer import checkpoint
from student_trainer.config import StudentConfig
from student_trainer.forms.freeze import freeze
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.student import Student, StudentError, load
from student_trainer.train import learn
from student_trainer.types import Prompt, Rollout

CPU = torch.device("cpu")


def frozen_names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


@pytest.mark.parametrize(
    ("arch", "words", "expected"),
    [
        ("qwen3", ["mlp"], r"model\.layers\.\d\.mlp\..*"),
        ("gpt2", ["mlp"], r"transformer\.h\.\d\.mlp\..*"),
        ("mixtral", ["mlp"], r"model\.layers\.\d\.mlp\..*"),  # experts and router
        ("qwen3", [r"layers\.1\.", "q_norm"], r".*(layers\.1\.|q_norm).*"),
        ("qwen3", ["lm_head"], r"(lm_head|model\.embed_tokens)\.weight"),  # tied: one tensor, both names
        ("llama", ["lm_head"], r"lm_head\.weight"),
    ],
)
def test_what_the_words_name_is_frozen_and_nothing_else(arch: str, words: list[str], expected: str) -> None:
    model = tiny_model(arch)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    freeze(model, words, ())
    assert frozen_names(model) == {name for name in names if re.fullmatch(expected, name)} != set()


@pytest.mark.slow
def test_frozen_weights_have_no_gradient_no_state_and_do_not_move(samples, tmp_path) -> None:  # noqa: F811
    base = save_tiny(tmp_path, scale=2.0)
    student = load(StudentConfig(model=str(base), freeze=("mlp", "embed_tokens")), CPU)
    run = bare_run(base, student=student, optim={"learning_rate": 0.01, "weight_decay": 0.1})
    model = run.student.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        run.step = step
        assert learn(run, samples)["skipped"] == 0.0
    frozen = {n for n in before if ".mlp." in n or "embed" in n}
    assert {n for n, p in model.named_parameters() if torch.equal(before[n], p)} == frozen
    state = {key.split("/")[1] for key in run.optimizer.state()[0]}
    assert state == before.keys() - frozen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers.7"], r"student.freeze: 'layers.7' matches no parameter of Qwen3ForCausalLM"),
        (["mlp", "conv1d"], "'conv1d' matches no parameter"),
        (["mlp", "."], r"student.freeze: \['mlp', '.'\] name all parameters"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(words: list[str], message: str, tmp_path) -> None:
    with pytest.raises(StudentError, match=message):
        load(StudentConfig(model=str(save_tiny(tmp_path)), freeze=tuple(words)), CPU)


def test_a_model_without_feed_forward_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="'mlp' matches no parameter of Mamba2ForCausalLM"):
        freeze(tiny_model("mamba2"), ["mlp"], ())


@pytest.mark.parametrize(
    ("words", "message"),
    [(("(",), "is no regular expression"), (("",), "an empty pattern"), (("replaced_layers",), "no layer is replaced")],
)
def test_words_that_can_mean_nothing_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(model="x", freeze=words)


# -- a class of the user's own

OWN_CLASSES = '''
import json
from pathlib import Path
from types import SimpleNamespace
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

class Rectified(Qwen3ForCausalLM):
    """Another architecture in transformers' clothes, with the parameters of the one that config.json names."""
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = torch.nn.ReLU()

class Bag(torch.nn.Module):
    """Nothing of transformers in it: the mean of all embeddings so far predicts the next token."""
    def __init__(self, width, hidden):
        super().__init__()
        self.config = Qwen3Config(vocab_size=width, hidden_size=hidden, max_position_embeddings=64)
        self.generation_config = GenerationConfig(eos_token_id=1)
        self.base_model = Trunk(width, hidden)
        self.lm_head = torch.nn.Linear(hidden, width, bias=False)
    def get_output_embeddings(self):
        return self.lm_head
    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))
    def save_pretrained(self, path):
        Path(path).mkdir(exist_ok=True)
        (Path(path) / "config.json").write_text(json.dumps({"shape": self.lm_head.weight.shape}))
        save_file(self.state_dict(), Path(path) / "bag.safetensors")
    @classmethod
    def from_pretrained(cls, path):
        bag = cls(*json.loads((Path(path) / "config.json").read_text())["shape"])
        bag.load_state_dict(load_file(Path(path) / "bag.safetensors"))
        return bag

class Trunk(torch.nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.embed = torch.nn.Embedding(width, hidden)
    def forward(self, input_ids, use_cache=False, return_dict=True):
        summed = self.embed(input_ids).cumsum(1)
        count = torch.arange(1, input_ids.shape[1] + 1, device=summed.device)
        return SimpleNamespace(last_hidden_state=summed / count[:, None])

class Unsaveable(torch.nn.Module):
    pass

def function():
    pass
'''


@pytest.fixture
def classes(tmp_path, monkeypatch) -> Path:
    (tmp_path / "forms_of_mine.py").write_text(OWN_CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Rectified", "Bag"])
def test_a_class_of_ones_own_samples_learns_is_saved_and_comes_back(name: str, samples, classes) -> None:  # noqa: F811
    import forms_of_mine

    made = save_tiny(classes / "made", scale=2.0)
    if name == "Bag":
        torch.manual_seed(0)
        forms_of_mine.Bag(128, 16).save_pretrained(made)
    settings = StudentConfig(model=str(made), model_class=f"forms_of_mine:{name}")
    run = bare_run(made, student=load(settings, CPU), optim={"learning_rate": 0.01})
    student = run.student
    assert type(student.model) is getattr(forms_of_mine, name)
    rollout = sampled(student)
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()
    with torch.no_grad():
        log_q = student.model(input_ids=ids).logits[0].log_softmax(-1)
    chosen = log_q[len(rollout.prompt.token_ids) - 1 : -1].gather(
        1, torch.from_numpy(rollout.token_ids).long()[:, None]
    )
    torch.testing.assert_close(torch.from_numpy(rollout.full_logprob), chosen[:, 0], atol=1e-5, rtol=1e-5)
    losses = []
    for step in range(6):
        run.step = step
        losses.append(learn(run, samples)["loss"])
    assert losses[-1] < losses[0]
    saved = checkpoint.export(classes / "saved", model=student.as_saved(), tokenizer=student.tokenizer)
    again = load(settings, CPU)
    assert not torch.equal(again.model(input_ids=ids).logits, student.model(input_ids=ids).logits)
    checkpoint.load_model_weights(saved, again.model)
    assert torch.equal(again.model(input_ids=ids).logits, student.model(input_ids=ids).logits)
    reloaded = load(settings.model_copy(update={"model": str(saved)}), CPU)
    assert torch.equal(reloaded.model(input_ids=ids).logits, student.model(input_ids=ids).logits)


def sampled(student: Student) -> Rollout:
    sampler = TorchSampler(
        student.model,
        eos_token_ids=student.eos_token_ids,
        pad_token_id=student.pad_token_id,
        vocabulary_size=student.vocabulary_size,
        config=RolloutConfig(max_new_tokens=6),
        seed=0,
    )
    return sampler.sample([Prompt(index=0, token_ids=np.arange(3, 8, dtype=np.int32))], [0])[0]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere_at_all:Cls", "can't import 'nowhere_at_all:Cls'"),
        ("forms_of_mine", "can't import 'forms_of_mine'"),
        ("forms_of_mine:Nothing", "can't import"),
        ("forms_of_mine:function", "is a function without from_pretrained and save_pretrained"),
        ("forms_of_mine:Unsaveable", "is a type without from_pretrained and save_pretrained"),
        ("forms_of_mine:Qwen3Config", "is a type; expected a torch module class"),
    ],
)
def test_what_is_no_class_of_a_model_is_refused(path: str, words: str, classes) -> None:
    with pytest.raises(StudentError, match=words):
        load(StudentConfig(model=str(save_tiny(classes / "plain")), model_class=path), CPU)


def test_a_class_that_peft_does_not_know_gets_no_adapters(classes) -> None:
    import forms_of_mine

    made = save_tiny(classes / "made")
    forms_of_mine.Bag(128, 16).save_pretrained(made)
    with pytest.raises(StudentError, match=r"student.lora: Bag has no add_adapter"):
        load(StudentConfig(model=str(made), model_class="forms_of_mine:Bag", lora={"r": 2}), CPU)
