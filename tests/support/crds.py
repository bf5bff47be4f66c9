"""Compares our schemas of the operators' objects with those of installed operators.

    kubectl get crd --output=json | python -m tests.support.crds

Prints every field of ours that an operator does not know or knows as another type, and every field that it
requires and we do not.
"""

import json
import sys
from collections.abc import Iterator

from tests.support.manifest_problems import OPERATORS
from tests.support.manifests import Tree


def differences(crds: Tree) -> Iterator[str]:
    """Where our schemas promise more than the operators, or ask for less.

    Args:
        crds: A list of CustomResourceDefinitions, as `kubectl get crd --output=json` prints it.
    """
    theirs = {
        (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]): version["schema"]
        for crd in crds["items"]
        for version in crd["spec"]["versions"]
    }
    for api_version, schema in OPERATORS.items():
        for kind in schema["properties"]["kind"]["enum"]:
            installed = theirs.get((api_version, kind))
            if installed is None:
                yield f"{kind}: no operator knows {api_version}"
                continue
            spec = installed["openAPIV3Schema"]["properties"]["spec"]
            yield from _compare(_spec_of(schema, kind), spec, schema, kind)


def _spec_of(schema: Tree, kind: str) -> Tree:
    """Our schema of `spec` of one kind: the branch of a condition on the kind."""
    for branch in schema.get("allOf", [schema]):
        is_kind = branch["if"]["properties"]["kind"]["const"] == kind
        if is_kind or "else" in branch:
            found: Tree = branch["then" if is_kind else "else"]["properties"]["spec"]
            return found
    raise KeyError(kind)


def _compare(ours: Tree, theirs: Tree, root: Tree, where: str) -> Iterator[str]:
    if "$ref" in ours:
        ours = root["$defs"][ours["$ref"].rpartition("/")[2]] | {k: v for k, v in ours.items() if k != "$ref"}
    kinds = {ours.get("type"), theirs.get("type")} - {None}
    if len(kinds) > 1 and kinds != {"integer", "number"}:
        yield f"{where}: {ours['type']} here, {theirs['type']} there"
        return
    if missing := set(theirs.get("required", [])) - set(ours.get("required", [])):
        yield f"{where}: {', '.join(sorted(missing))} required there"
    known = theirs.get("properties")
    for name, part in ours.get("properties", {}).items():
        if known is not None and name not in known:
            yield f"{where}.{name}: unknown there"
        elif known is not None:
            yield from _compare(part, known[name], root, f"{where}.{name}")
    if "items" in ours and "items" in theirs:
        yield from _compare(ours["items"], theirs["items"], root, f"{where}[]")


def main() -> int:
    found = list(differences(json.load(sys.stdin)))
    print("\n".join(found) or "no differences")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
