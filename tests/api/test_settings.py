"""Configuration: order of the sources, all spellings, and one clear line for everything that is wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, SecretStr, SerializeAsAny, field_validator, model_validator

from teacher_api.settings import Section, SettingsError, dump_yaml, load


class Optim(Section):
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.95)
    name: Literal["adamw", "muon"] = "adamw"
    """Which rule."""


class Teacher(Section):
    url: tuple[str, ...] = ()
    """Where it is."""
    top_k: int | Literal["all"] = 64
    api_key: SecretStr = SecretStr("")
    keys: tuple[SecretStr, ...] = ()
    reference: bool = False
    extra: dict[str, Any] = Field(default_factory=dict)
    limit: int | None = 3

    @field_validator("limit")
    @classmethod
    def _even_is_bad(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError(f"got {value}, expected an odd number")
        return value


class Loss(Section):
    objective: str
    temperature: float = Field(1.0, gt=0)


class Skewed(Loss):
    skew_alpha: float = 0.5


def pick(value: Any) -> Loss:
    if isinstance(value, Loss):
        return value
    keys = {"objective": "plain", **value}
    return {"plain": Loss, "skewed": Skewed}[keys["objective"]].model_validate(keys)


class Config(Section):
    model: str = ""
    """What is served."""
    optim: Optim = Optim()
    teacher: Teacher = Teacher()
    loss: Annotated[SerializeAsAny[Loss], BeforeValidator(pick)] = Field(
        default_factory=lambda: Loss(objective="plain")
    )

    @model_validator(mode="after")
    def _whole(self) -> Config:
        if self.model == "bad":
            raise ValueError("model is bad, expected a good one")
        return self


class Required(Section):
    model: str
    http_port: int = 80


def read(*argv, env=None, cls=Config, flat=False):
    config, extras = load(
        cls,
        argv,
        prog="prog",
        description="A program.",
        env_prefix="PRE_",
        shortcuts={"teacher-url": "teacher.url", "m": "model"} if cls is Config else {},
        switches={"dry-run": "Do nothing."},
        environ=env or {},
        flat=flat,
    )
    return config, extras


def test_defaults():
    assert read()[0] == Config()


def test_order_of_sources(tmp_path):
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("model: one\noptim: {learning_rate: 0.1, name: muon}\nteacher: {top_k: 1, url: [a, b]}\n")
    two.write_text("model: two\nteacher:\n  url: [c]\noptim:\n  # all commented out\n")
    env = {"PRE_MODEL": "env", "PRE_TEACHER__TOP_K": "2"}
    files = ("--config", str(one), f"--config={two}")
    config, extras = read(*files, "--model", "line", env=env)
    assert config.model == "line"
    assert config.teacher.top_k == 2, "environment over files"
    assert config.teacher.url == ("c",), "later file over earlier one, lists are replaced"
    assert (config.optim.learning_rate, config.optim.name) == (0.1, "muon"), "sections are merged key by key"
    assert config.optim.betas == (0.9, 0.95)
    assert extras.config_files == (one, two)
    assert extras.origins["model"] == "command line --model"
    assert extras.origins["teacher.top_k"] == "environment PRE_TEACHER__TOP_K"
    assert extras.origins["optim.name"] == str(one)
    assert read(env={"PRE_CONFIG": f"{one}:{two}"})[0].model == "two"


@pytest.mark.parametrize(
    "words",
    [
        ["--optim.learning_rate", "1e-2"],
        ["--optim.learning-rate", "1e-2"],
        ["--optim.learning-rate=1e-2"],
        ["--optim.learning_rate=.01"],
        ["optim.learning_rate=0.01"],
        ["optim.learning-rate=0.01"],
    ],
)
def test_spellings(words):
    assert read(*words)[0].optim.learning_rate == 0.01


def test_values():
    config, _ = read(
        *("--teacher-url", "a", "--teacher.url=b", "teacher.url=c"),
        *("--teacher.top-k", "all", "--optim.betas", "[0.1, 0.2]", "--model", "123", "--teacher.limit=none"),
        *("--teacher.extra.some-Key", "1e-3", "teacher.extra.flag=true", "teacher.extra.deep.er=[1, x]"),
    )
    assert config.teacher.url == ("a", "b", "c")
    assert config.teacher.top_k == "all"
    assert config.optim.betas == (0.1, 0.2)
    assert config.model == "123", "text stays text"
    assert config.teacher.limit is None
    assert config.teacher.extra == {"some-Key": 0.001, "flag": True, "deep": {"er": [1, "x"]}}
    assert read("--teacher-url", "[x, y]")[0].teacher.url == ("x", "y")
    assert read(env={"PRE_TEACHER__EXTRA": '{"a": 1}', "PRE_TEACHER__URL": "u"})[0].teacher.extra == {"a": 1}


def test_flags():
    assert read("--teacher.reference", "--model", "x")[0].teacher.reference
    assert read("--teacher.reference")[0].teacher.reference
    assert not read("--teacher.reference", "no")[0].teacher.reference
    assert not read("--no-teacher.reference", env={"PRE_TEACHER__REFERENCE": "1"})[0].teacher.reference
    _, extras = read("--dry-run")
    assert "dry-run" in extras
    assert "dry_run" in extras
    assert "dry-run" not in read()[1]


def test_flat_names():
    assert read("--learning-rate", "0.5", "--reference", flat=True)[0].optim.learning_rate == 0.5
    assert read("--http-port", "7", "--model=m", cls=Required)[0].http_port == 7
    with pytest.raises(SettingsError, match=r"did you mean optim.learning_rate\?"):
        read("--learning-rate", "0.5")


def test_a_section_chosen_by_a_key():
    config, _ = read("--loss.objective", "skewed", "--loss.skew-alpha", "0.25", "--loss.temperature=2")
    assert config.loss == Skewed(objective="skewed", skew_alpha=0.25, temperature=2.0)


def test_orchestrators_may_add_variables():
    env = {"PRE_SERVICE_HOST": "10.0.0.1", "PRE_PORT": "tcp://10.0.0.1:80", "PRE_PORT_80_TCP_ADDR": "x", "OTHER": "1"}
    assert read(env=env)[0] == Config()


WRONG = {
    "--modle x": "command line: modle: unknown key; did you mean model?",
    "--optm.learning_rate 1": "command line: optm.learning_rate: unknown key; did you mean optim.learning_rate?",
    "--teacher.learning_rate 1": "command line: teacher.learning_rate: unknown key; did you mean optim.learning_rate?",
    "--teacher-ulr x": "command line: teacher_ulr: unknown key; did you mean --teacher-url?",
    "--dry-rn": "command line: dry_rn: unknown key; did you mean --dry-run?",
    "--dry-run=1": "--dry-run takes no value, got '1'",
    "stray": "unexpected argument 'stray'; expected --key value or key=value (--help lists keys)",
    "--model": "--model: expected a value after it",
    "--model --dry-run": "--model: expected a value after it",
    "--config": "--config: expected a file after it",
    "--optim.learning_rate 2": (
        "command line --optim.learning_rate: optim.learning_rate: got 2, expected less than or equal to 1"
    ),
    "--optim.learning_rate x": (
        "command line --optim.learning_rate: optim.learning_rate: got 'x', expected a valid number, "
        "unable to parse string as a number"
    ),
    "--optim.name sgd": "command line --optim.name: optim.name: got 'sgd', expected 'adamw' or 'muon'",
    "--teacher.top_k x": (
        "command line --teacher.top_k: teacher.top_k: got 'x', expected a valid integer, "
        "unable to parse string as an integer or 'all'"
    ),
    "--optim.betas [1]": "command line --optim.betas: optim.betas[1]: got [1], expected one more value",
    "--teacher.limit 4": "command line --teacher.limit: teacher.limit: got 4, expected an odd number",
    "--model bad": "model is bad, expected a good one",
    "--teacher.keys []x": "command line --teacher.keys: '[]x' is not valid YAML",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines(line):
    words = line.split(" ", 1) if line.startswith("--") else [line]
    if line == "--model --dry-run":
        words = ["--model", "--dry-run"]
    with pytest.raises(SettingsError) as caught:
        read(*words)
    message = str(caught.value)
    assert message.startswith(WRONG[line]) if line.endswith("[]x") else message == WRONG[line]
    assert "\n" not in message


def test_several_wrong_keys_are_counted():
    with pytest.raises(SettingsError, match=r"learning_rate.*\(and 1 more wrong\)"):
        read("--optim.learning_rate=7", "--teacher.limit=4")


def test_missing_key():
    with pytest.raises(SettingsError) as caught:
        read(cls=Required)
    assert str(caught.value) == "model: not set; give --model, PRE_MODEL or `model` in a --config file"


def test_wrong_environment():
    with pytest.raises(SettingsError, match=r"environment PRE_OPTIM__LR: optim\.lr: unknown key"):
        read(env={"PRE_OPTIM__LR": "1"})
    with pytest.raises(SettingsError, match=r"environment PRE_OPTIM__NAME: optim\.name: got 'x'"):
        read(env={"PRE_OPTIM__NAME": "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lr: 1}", "optim.lr: unknown key"),
        ("optim: {learning_rate: -1}", "optim.learning_rate: got -1, expected greater than 0"),
        ("a: [", "not valid YAML at line 1"),
        ("model: a\nmodel: b", "not valid YAML at line 2: the key 'model' is there twice"),
        ("- 1", "holds a list; expected keys and values"),
        ("optim: 3", "optim: got 3, expected a valid dictionary"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("loss: {skew_beta: 1}", "loss.skew_beta: unknown key"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError) as caught:
        read("--config", str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: can't be read: No such file"):
        read("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read("--config", str(tmp_path / "binary"))


def test_secrets_are_never_shown():
    config, _ = read(env={"PRE_TEACHER__API_KEY": "hush", "PRE_TEACHER__KEYS": "hush"})
    assert config.teacher.api_key.get_secret_value() == "hush"
    assert [k.get_secret_value() for k in config.teacher.keys] == ["hush"]
    assert "hush" not in dump_yaml(config)
    with pytest.raises(SettingsError) as caught:
        read("--teacher.keys", "[hush, [hush]]")
    assert "hush" not in str(caught.value)


def test_the_dump_reads_back(tmp_path):
    config, _ = read(
        "--loss.objective=skewed", "--teacher.url=x", "--teacher.limit=null", "--teacher.extra.a=1", "--model=yes"
    )
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config))
    assert read("--config", str(path))[0] == config


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for expected in (
        "--optim.learning-rate  (float, default: 0.001)\n      Step size.",
        "--teacher.url, --teacher-url  (list, default: none)\n      Where it is.",
        "(adamw|muon, default: adamw)",
        "--dry-run  Do nothing.",
        "PRE_A__B",
        "--loss.objective",
    ):
        assert expected in text


def test_help_marks_required_keys(capsys):
    with pytest.raises(SystemExit):
        read("-h", cls=Required)
    assert "--model  (str, required)" in capsys.readouterr().out
