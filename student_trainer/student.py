"""The model that learns: loading, what its tokenizer says of ends and padding, and the forward pass of a micro-batch,
packed or padded, down to the hidden rows that are scored. No loss, no optimizer, no sampling here.

Shape legend: B sequences, T tokens (right-padded), N scored rows of all sequences together, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.config import StudentConfig
from student_trainer.forms import graft, lora
from student_trainer.forms.freeze import freeze
from student_trainer.forms.loading import LOAD_ERRORS, StudentError, load_pretrained, locate
from student_trainer.losses.heads import Head
from student_trainer.packing import PADDED, Packing, Row
from student_trainer.types import Rollout
from teacher_api import causal_lm

VERIFY_TOKENS = 16
"""Length of the sequence on which trunk and head are held against the whole model after loading."""


@dataclass(frozen=True, slots=True)
class Student:
    """A loaded student. `parts` shares the model's parameters."""

    model: Any
    tokenizer: Any
    parts: causal_lm.Parts
    device: torch.device
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_tokens: int  # longest sequence its positions allow; 0: no limit stated
    autocast: bool  # bfloat16 arithmetic on float32 weights
    adapter_dropout: bool = False  # of LoRA, while training
    packing: Packing = PADDED  # how micro-batches are laid out

    @property
    def vocabulary_size(self) -> int:
        """Ids the tokenizer knows; the model's logits may be wider."""
        return len(self.tokenizer)

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward pass of this student: bfloat16 arithmetic where that was asked for."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def hidden_rows(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Hidden states [N, H] from which the completion tokens of `rollouts` are predicted, one after the other: the
        row of completion token n of a sample is position P + n - 1 of its sequence, P prompt tokens.

        Unpacked, padding is on the right and unmasked: the models are causal, so no real token sees it.
        """
        if self.packing.packed:
            with self.arithmetic():
                return Row.of(rollouts, self.packing).hidden_rows(self.parts, self.device)
        lengths = [len(r.prompt.token_ids) + r.num_tokens for r in rollouts]
        # The last token of a sequence predicts nothing that is scored.
        tokens_BT = np.full((len(rollouts), max(lengths) - 1), self.pad_token_id, dtype=np.int64)
        rows, columns = [], []
        for b, rollout in enumerate(rollouts):
            prompt_tokens = len(rollout.prompt.token_ids)
            sequence = np.concatenate([rollout.prompt.token_ids, rollout.token_ids])
            tokens_BT[b, : len(sequence) - 1] = sequence[:-1]
            rows.append(np.full(rollout.num_tokens, b, dtype=np.int64))
            columns.append(np.arange(prompt_tokens - 1, len(sequence) - 1, dtype=np.int64))
        index = (torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns)))
        with self.arithmetic():
            hidden_BTH = self.parts.trunk(torch.from_numpy(tokens_BT).to(self.device))
        return hidden_BTH[index[0].to(self.device), index[1].to(self.device)]  # type: ignore[no-any-return]

    @property
    def head(self) -> Head:
        """Logits [N, W] of hidden rows [N, H], W the columns the model defines; the loss takes it apart."""
        return Head(self.parts, self.autocast)

    def as_saved(self) -> Any:
        """What a checkpoint holds of the model: all of it, or its adapters. It has save_pretrained."""
        return lora.AdapterFiles(self.model) if lora.is_adapted(self.model) else self.model

    def exports(self) -> dict[str, Any]:
        """What a run leaves in the end, by the end of its directory's name: a model that plain transformers loads, and
        the adapters it was merged from."""
        if not lora.is_adapted(self.model):
            return {"": self.model}
        return {"": lora.merged(self.model), "-adapter": lora.AdapterFiles(self.model)}

    def seed_dropout(self, seed: int, uid: int) -> None:
        """Makes the dropout of the next micro-batch, if there is any, a function of the run's seed and its first
        sample's number."""
        if self.model.training or self.adapter_dropout:
            torch.manual_seed(int(np.random.SeedSequence([seed, uid]).generate_state(1, np.uint64)[0] >> 1))


def load(config: StudentConfig, device: torch.device, *, seed: int = 0, checkpoint: Path | None = None) -> Student:
    """Loads model and tokenizer, gives the model its form, checks the cut into trunk and head, and prepares it for
    training.

    Args:
        seed: of what a form adds at random, such as adapters.
        checkpoint: one that this student's run goes on from. Layers of another model are taken from there, so that
            model need not be there any more. (The other weights are checkpoint.load_model_weights' to restore.)
    Raises:
        StudentError: nothing there, damaged, not a causal language model, without some of its weights or a tokenizer;
            or a form that does not fit the model.
    """
    import transformers

    with _quiet(transformers):
        tokenizer = load_tokenizer(config)
        if checkpoint is not None and config.layers_from_teacher:
            model = load_pretrained("checkpoint", str(checkpoint), model_class=config.model_class)
        else:
            model = load_pretrained("student.model", config.model, config.revision, config.model_class)
        _form(model, tokenizer, config, seed, has_layers=checkpoint is not None)
    model.to(device)
    eos = eos_token_ids(model, tokenizer)
    if len(tokenizer) > causal_lm.logit_width(model):
        raise StudentError(
            f"student.model {config.model!r}: its tokenizer has {len(tokenizer)} entries, its head only "
            f"{causal_lm.logit_width(model)} columns; expected at least as many columns"
        )
    parts = _verified(model, len(tokenizer), device)
    _prepare(model, config)
    pad = tokenizer.pad_token_id
    limit = getattr(causal_lm.text_config(model.config), "max_position_embeddings", None)
    return Student(
        model=model,
        tokenizer=tokenizer,
        parts=parts,
        device=device,
        eos_token_ids=eos,
        pad_token_id=int(pad if pad is not None else (eos[0] if eos else 0)),
        max_tokens=int(limit or 0),
        autocast=config.dtype == "bfloat16",
        adapter_dropout=config.lora.dropout > 0,
    )


def load_tokenizer(config: StudentConfig) -> Any:
    """The student's tokenizer alone. Raises StudentError where there is none."""
    return _tokenizer("student.model", config.model, config.revision)


def _tokenizer(key: str, model: str, revision: str = "") -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(**locate(key, model, revision))
    except LOAD_ERRORS as error:
        if isinstance(error, StudentError):
            raise
        cause = " ".join(str(error).split())[:300]
        raise StudentError(f"{key} {model!r} can't be loaded: {cause}") from error


def _form(model: Any, tokenizer: Any, config: StudentConfig, seed: int, *, has_layers: bool) -> None:
    """Layers of another model, adapters, or weights that stay as they are."""
    replaced: list[str] = []
    try:
        if config.lora.r:
            path = Path(config.model).expanduser()
            base = str(path.resolve()) if path.is_dir() else config.model
            lora.add(model, config.lora, seed=seed, base=base, revision=config.revision)
        if config.layers_from_teacher and not has_layers:
            _same_vocabulary(tokenizer, _tokenizer("student.graft_from", config.graft_from))
            donor = load_pretrained("student.graft_from", config.graft_from)
            graft.graft(model, donor, config.layers_from_teacher)
        if config.layers_from_teacher:
            name, _ = graft.decoder_layers(model)
            replaced = [f"{name}.{layer}" for layer in config.layers_from_teacher]
        freeze(model, config.freeze, replaced)
    except ValueError as error:
        raise StudentError(str(error)) from error


def _same_vocabulary(mine: Any, theirs: Any) -> None:
    """Layers of a model that reads other token ids know nothing of ours."""
    if mine.get_vocab() != theirs.get_vocab():
        raise StudentError(
            f"student.graft_from: its tokenizer has {len(theirs)} entries, the student's {len(mine)}, and they are not "
            "the same; expected a model that reads the same token ids"
        )


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's (it may list several), and the tokenizer's own.

    Raises:
        StudentError: there is none, so no completion could ever end.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(listed) if isinstance(listed, list | tuple) else [listed]
    found = sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None and 0 <= int(i) < len(tokenizer)})
    if not found:
        raise StudentError("student.model has no end-of-sequence token in its tokenizer or generation config")
    return tuple(found)


def room_for(prompt_tokens: int, new_tokens: int, student: Student, new_key: str, prompt_key: str) -> int:
    """Length of the longest prompt with its completion.

    Args:
        new_key, prompt_key: the options that say how long each may be.
    Raises:
        ValueError: the student has no positions for it.
    """
    longest = prompt_tokens + new_tokens
    if student.max_tokens and longest > student.max_tokens:
        raise ValueError(
            f"the longest prompt and {new_key} make {longest} tokens, the student has positions for "
            f"{student.max_tokens}; lower {new_key} or set {prompt_key}"
        )
    return longest


def require_known(key: str, token_ids: Sequence[int], tokenizer: Any) -> None:
    """Raises ValueError for ids that the tokenizer has not, which no sample could ever hold.

    Args:
        key: the option that lists them.
    """
    unknown = [i for i in token_ids if not 0 <= i < len(tokenizer)]
    if unknown:
        raise ValueError(
            f"{key}: got {', '.join(map(str, unknown))}, expected ids from 0 to {len(tokenizer) - 1}: the student's "
            f"tokenizer has {len(tokenizer)} entries"
        )


def parameter_count(student: Student) -> int:
    return sum(p.numel() for p in student.model.parameters())


@torch.no_grad()
def _verified(model: Any, vocabulary_size: int, device: torch.device) -> causal_lm.Parts:
    model.eval()
    try:
        parts = causal_lm.split(model)
        ids = torch.arange(VERIFY_TOKENS, device=device)[None] % vocabulary_size
        causal_lm.verify(parts, model, ids)
    except ValueError as error:
        raise StudentError(f"student.model: {error}") from error
    return parts


def _prepare(model: Any, config: StudentConfig) -> None:
    """Modes of training. Without dropout the model stays in eval mode, except that gradient checkpointing exists in
    train mode only; there the dropouts themselves are set to zero."""
    if not config.dropout:
        kept = set(lora.dropouts(model)) if config.lora.dropout else set()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module not in kept:
                module.p = 0.0
            for name in ("attention_dropout", "dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    if config.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise StudentError(
                f"{type(model).__name__} has no gradient checkpointing: turn student.gradient_checkpointing off"
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(config.dropout or config.gradient_checkpointing)
    if config.lora.dropout:
        lora.train_dropout(model)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Loading without transformers' own notes. Its bars stay off for good: they would write into ours."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
