"""Whatever the input: settings, names of weights and records are taken as they are, or refused in one sentence."""

import json
import math
import string
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from metaformer import InputError, convert, records
from metaformer.formats import FROM, MARKS, TO, recognised
from metaformer.provenance import write_json
from metaformer.training import yaml12
from metaformer.training.config import Config, check, load_config, parse_overrides, save_config
from test_analysis import evaluation

# The same examples in every run, and no limit to their time, which the machine decides.
settings.register_profile("here", derandomize=True, deadline=None, max_examples=150, database=None)
settings.load_profile("here")

NAMES = list(Config.model_fields)
TEXT = st.text(max_size=30)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(), inner, max_size=3),
    max_leaves=6,
)
SIGNS = [*":-[]{},&*!|>'\"#?%@`~\n\t", "---", "  ", ": ", "- ", "&a ", "*a", "<<"]
TAGS = ["!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!python/name:os.system", "!!set ", "!!omap "]
VALUES = ["2001-99-99", "1e999", ".nan", "0x", "0b2", "1:61", "null", "true", "0.5", "7", "base"]
TOKENS = st.sampled_from([*NAMES, *SIGNS, *TAGS, *VALUES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def refused(error: InputError, rightly: bool = True) -> None:
    assert rightly, error
    assert "\n" not in str(error)
    assert 0 < len(str(error)) < 20_000


# The config parser


@given(content=st.binary(max_size=60) | st.lists(TOKENS, max_size=25).map(lambda parts: "".join(parts).encode()))
def test_any_file_is_a_config_or_refused(content, folder):
    path = folder / "any.yaml"
    path.write_bytes(content)
    try:
        config = load_config([str(path)])
    except InputError as error:
        refused(error)
        return
    assert isinstance(config, Config)


@given(values=st.dictionaries(st.sampled_from(NAMES) | TEXT, PLAIN, max_size=4))
def test_any_values_are_settings_or_refused(values, folder):
    path = folder / "values.yaml"
    try:
        config = check(values, "the test")
    except InputError as error:
        refused(error)
        return
    assert values.keys() <= Config.model_fields.keys()
    if not any(isinstance(value, float) and math.isnan(value) for value in leaves(config.model_dump())):
        save_config(config, path)
        assert load_config([str(path)]) == Config.model_validate(config.model_dump(mode="json"))


def leaves(value):
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


@given(arguments=st.lists(st.tuples(st.sampled_from(["", "--", "--no-"]), st.sampled_from(NAMES) | TEXT,
                                    st.sampled_from(["", "="]), st.lists(TOKENS, max_size=5).map("".join))
                          .map("".join), max_size=4))  # fmt: skip
def test_any_command_line_is_settings_or_refused(arguments):
    try:
        values = parse_overrides(arguments)
    except InputError as error:
        refused(error)
        return
    assert values.keys() <= Config.model_fields.keys()


@given(value=st.integers(-5, 5) | st.floats(-2, 2) | st.booleans() | st.sampled_from(["cosine", "a b", "float32"]),
       name=st.sampled_from(NAMES))  # fmt: skip
def test_file_and_command_line_mean_the_same(value, name, folder):
    path = folder / "same.yaml"
    path.write_text(yaml12.dump({name: value}))
    (folder / "empty.yaml").write_text("")
    ways = [[str(path)], [str(folder / "empty.yaml"), f"{name}={yaml12.dump(value).splitlines()[0]}"]]
    results = []
    for arguments in ways:
        try:
            results.append(load_config(arguments))
        except InputError:
            results.append(None)
    assert results[0] == results[1]


@given(values=st.dictionaries(TEXT, PLAIN, max_size=4))
def test_what_is_written_is_read_back(values):
    """By the standard that we read, and by PyYAML, of YAML 1.1."""
    if not any(isinstance(value, float) and math.isnan(value) for value in leaves(values)):
        values = json.loads(json.dumps(values, default=str))
        assert yaml12.load(yaml12.dump(values)) == values
        assert yaml.safe_load(yaml12.dump(values)) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E3", 1000.0), (".5", 0.5), ("-2.", -2.0), ("010", 10), ("0o10", 8), ("0x1F", 31),
        ("1:30", "1:30"), ("1_000", "1_000"), ("yes", "yes"), ("off", "off"), ("true", True), ("~", None),
        ("2026-11-23", "2026-11-23"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value, folder):
    """Section 10.3.2 of the standard."""
    (folder / "numbers.yaml").write_text(f"model_args: {{x: {text}}}")
    for arguments in ([f"model_args={{x: {text}}}"], [str(folder / "numbers.yaml")]):
        found = load_config(arguments).model_args["x"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["20261123", "007", "1e-6", "true", "1:30", "2012-01-01", "a # b", "a: b", "[a", "*a"])
def test_settings_that_are_text_are_not_parsed(text, folder):
    (folder / "numbers.yaml").write_text("".join(f"{name}: {text}\n" for name in ("output", "data_dir", "checkpoint")))
    ways = [["output=" + text, "data_dir=" + text, "--checkpoint", text]]
    if text.isalnum() or text[0].isdigit():
        ways.append([str(folder / "numbers.yaml")])
    for arguments in ways:
        config = load_config(arguments)
        assert (config.output, config.data_dir, config.checkpoint) == (text, text, text)
    assert load_config(["data_dir=null"]).data_dir is None


def test_a_key_that_is_there_twice_is_refused(folder):
    for text in ("epochs: 3\nlr: 1\nepochs: 300", "model_args: {a: 1, a: 2}"):
        (folder / "twice.yaml").write_text(text)
        with pytest.raises(InputError, match=r"is not valid YAML: the key '(epochs|a)' occurs twice"):
            load_config([str(folder / "twice.yaml")])


def test_few_lines_that_mean_many_are_refused_at_once(folder):
    path = folder / "many.yaml"
    lines = ["model_args:", "  a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    path.write_text("\n".join([*lines, "epochs: *a29"]))
    with pytest.raises(InputError, match=r"epochs is \[\[\.\.\.\], .* valid integer") as error:
        load_config([str(path)])
    refused(error.value)
    path.write_text("epochs: &a [*a]")
    with pytest.raises(InputError, match="epochs is"):
        load_config([str(path)])
    path.write_text("model: " + "[" * 5000)
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config([str(path)])


# The format recogniser

PARTS = ["network", "stages", "blocks", "backbone", "stem", "conv", "proj", "pos_embed", "position", "downsample"]
PARTS += ["layer_scale", "layer_scale_1", "layer_scale1", "scale", "norm", "norm1", "norm6", "head", "fc", "weight"]
PARTS += ["poolformer", "encoder", "block", "patch_embeddings", "patch_embed", "before_norm", "module", "0", "1", "2"]
PARTS += ["12", "007", "9" * 5000, "\n", "", "²"]
WEIGHTS = st.dictionaries(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join) | TEXT | st.integers(),
    st.just(torch.zeros(1)),
    max_size=8,
)


@given(weights=WEIGHTS, to=st.sampled_from(list(TO)))
def test_any_names_are_renamed_or_refused_and_none_is_lost(weights, to):
    kind = recognised(weights)
    assert kind is None or kind in FROM
    try:
        result = convert(weights, to)
    except InputError as error:
        refused(error, kind is None or kind == "toolbox" or "two tensors" in str(error))
        return
    assert kind is not None
    if kind != "toolbox":
        assert len(result) == len(weights)
    assert all(isinstance(name, str) for name in result)


@given(weights=WEIGHTS)
def test_the_format_does_not_depend_on_the_order(weights):
    assert recognised(weights) == recognised(dict(reversed(weights.items())))


@given(weights=WEIGHTS, kind=st.sampled_from(list(MARKS)))
def test_what_has_no_marked_name_is_not_recognised(weights, kind):
    marked = {name for name in weights if recognised({name: 0}) is not None}
    assert recognised({name: weights[name] for name in weights if name not in marked}) is None


# The record importer

PLACES = [("kind",), ("model",), ("date",), ("metrics",), ("metrics", "top1"), ("metrics", "images"), ("training",)]
PLACES += [("checkpoint", "file"), ("hardware", "gpus"), ("data", "classes"), ("settings", "img_size"), ("versions",)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def imported(path: Path, results: Path) -> None:
    try:
        targets = records.import_records([path], results)
    except InputError as error:
        refused(error)
        return
    for target in targets:
        assert target.parent == results
        records.read_record(target)
        assert records.import_records([target], results) == [target]  # it is what it was taken for
        target.unlink()


@given(content=st.binary(max_size=50) | st.text(string.printable, max_size=50).map(str.encode) | JSON.map(
    lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_file_is_a_record_or_refused(content, folder):
    path = folder / "any.json"
    path.write_bytes(content)
    imported(path, folder / "results")


@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_a_record_with_any_values_is_taken_or_refused(changes, folder):
    record = json.loads(json.dumps(evaluation()))
    for place, value in changes:
        part = record
        for key in place[:-1]:
            part = part[key] if isinstance(part.get(key), dict) else {}
        part[place[-1]] = value
    write_json(folder / "changed.json", record)
    imported(folder / "changed.json", folder / "results")
