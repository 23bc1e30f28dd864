"""Read and write YAML 1.2 with PyYAML, whose YAML 1.1 reads 1e-6 as text, 010 as 8, 1:30 as 90 and yes as true.

Types follow the core schema (https://yaml.org/spec/1.2.2/#103-core-schema). Duplicate keys are errors.
"""

import re
from collections.abc import Collection
from typing import Any

import yaml

NULL, BOOL, INT, FLOAT, STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
NULLS = ("", "~", "null", "Null", "NULL")
CORE_SCHEMA = {
    NULL: "|".join(NULLS),
    BOOL: "true|True|TRUE|false|False|FALSE",
    INT: "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0][:100]!r} occurs twice")
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes every string that a reader of YAML 1.1 or 1.2 would parse as another type."""


for _class in (Loader, Dumper):
    for _tag, _pattern in CORE_SCHEMA.items():
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
Loader.add_constructor(INT, lambda _, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10))


def load(text: str | bytes, texts: Collection[str] = ()) -> Any:
    """Read a document; untagged scalars of the keys in ``texts`` stay text."""
    loader = Loader(text)
    node = loader.get_single_node()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in texts and value.tag in (BOOL, INT, FLOAT):
            value.tag = STR
    return None if node is None else loader.construct_document(node)


def dump(values: Any) -> str:
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)
