"""The lifecycle table, and the direction of imports: two rules that hold everywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vhostbridge
from vhostbridge.backends.errors import InvalidTransition
from vhostbridge.backends.lifecycle import TRANSITIONS, State, Verb, step

PACKAGE = Path(vhostbridge.__file__).parent
#: Who may import whom, lowest first.
LAYERS = ("native", "backends", "bridge", "cli")


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("verb", Verb)
def test_step_is_the_tables_or_is_refused_with_what_is_allowed(state: State, verb: Verb) -> None:
    if verb in TRANSITIONS[state]:
        assert step(state, verb) is TRANSITIONS[state][verb]
        return
    with pytest.raises(InvalidTransition) as refused:
        step(state, verb)
    assert refused.value.message == f"cannot {verb.value} a device that is {state.value}"
    assert all(allowed.value in refused.value.hint for allowed in TRANSITIONS[state])


def test_every_state_can_be_closed_and_only_closed_has_no_way_out() -> None:
    assert all(TRANSITIONS[state][Verb.CLOSE] is State.CLOSED for state in State)
    assert set(TRANSITIONS[State.CLOSED].values()) == {State.CLOSED}
    assert all(Verb.RESET in TRANSITIONS[state] for state in State if state is not State.CLOSED)


def imported(path: Path) -> set[str]:
    """The layers that a module imports, by its absolute imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "vhostbridge" and rest.split(".")[0] in LAYERS:
                found.add(rest.split(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_no_module_imports_a_higher_layer(layer: str) -> None:
    folder = PACKAGE / layer
    paths = list(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{layer}.py"]
    assert paths
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    assert {str(path): imported(path) - allowed for path in paths} == {
        str(path): set() for path in paths
    }
