"""The quickstart's tokenizer: byte-level BPE trained on the task itself, every digit its own token."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.quickstart import task

EOS, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
VOCABULARY_SIZE = 181
NUM_TEXTS = 2_000

PIECES = Regex(r"[0-9]| ?[A-Za-z]+|[^0-9A-Za-z]+")
"""A digit, a word with the space before it, or a run of anything else: merges never cross these borders."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains it (0.1 s). Its alphabet is that of the task; a character from elsewhere becomes `<|unknown|>`."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=[PAD, EOS, UNKNOWN], initial_alphabet=[], show_progress=False
    )
    texts = (task.prompt_text(p) + p.solution for p in task.problems("train", NUM_TEXTS, seed))
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
