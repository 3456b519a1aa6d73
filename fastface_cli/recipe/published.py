"""Convert JSON configurations of the published FastFace code to recipes.

Names of keys, schedules and transforms are those of the published repository (`configs/`,
`src/cfg_schedulers.py`, `src/dcg.py`, `src/custom_dca.py`); docs/how-it-works.md explains them.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import RecipeError, nearest
from .tree import Key, Mark, Node, Plain, mapping, mark_tree

ROWS = ("hyper", "lightning", "lcm", "turbo", "base", "pocket")

ORDERS = {1: "text_first", 2: "independent", 3: "identity_first"}
"""`dcg_type`. Weight `a` applies to the first term: the identity in `identity_first`, otherwise the text."""

FUNCTIONS: dict[str, dict[str, Plain]] = {
    "linear": {"function": "linear"},
    "inv_linear": {"function": "linear", "inverse": True},
    "clamped_lin": {"function": "linear", "floor": "c"},
    "inv_clamp_linear": {"function": "linear", "inverse": True, "floor": "c"},
    "cos": {"function": "cosine"},
    "inv_cos": {"function": "cosine", "inverse": True},
    "pcs": {"function": "power_cosine", "power": "s"},
    "inv_pcs": {"function": "power_cosine", "power": "s", "inverse": True},
    "clamped_pcs": {"function": "power_cosine", "power": "s", "floor": "c"},
    "inv_clamped_pcs": {"function": "power_cosine", "power": "s", "inverse": True, "floor": "c"},
    "capshape": {"function": "cap"},
    "ccshape": {"function": "cap", "floor": "c"},
}
"""Guidance schedules as weight functions; "c" and "s" are arguments in `sch_kwargs`."""

SCHEDULERS = ("default", "custom", *FUNCTIONS)

K = [7.5, 5.0, 5.0, 5.0]
LEVEL = 0.65
G = [1.0, 1.55, 1.55, 1.55]

TRANSFORMS: dict[str, dict[str, Plain]] = {
    "pow": {"kind": "power", "p": {"down": 1.3, "mid": 1.0, "up": 1.3}},
    "scale": {"kind": "scale", "g": {"down": 1.55, "mid": 1.0, "up": 1.45}},
    "softmask": {"kind": "softmask", "k": {"down": 12.5, "mid": 1.0, "up": 12.5}},
    "adaptive_softmask": {
        "kind": "adaptive_softmask",
        "k": {"down": 12.5, "mid": 1.0, "up": 12.5},
        "level": {"down": 0.6, "mid": 1.0, "up": 0.6},
    },
}
SCHEDULED: dict[str, dict[str, Plain]] = {
    "pow": TRANSFORMS["pow"],
    "scale": {"kind": "scale", "g": {"down": [*G], "up": [*G]}},
    "softmask": {"kind": "softmask", "k": {"down": [*K], "up": [*K]}},
    "adaptive_softmask": {
        "kind": "adaptive_softmask",
        "k": {"down": [*K], "up": [*K]},
        "level": {"down": LEVEL, "up": LEVEL},
    },
}
"""The same with `apply_schedule`, which keeps `pow` and has no values for the mid block."""

RESCALE = 0.7
"""phi if `term_postproc` requests a rescale without `rescale`."""

WEIGHT = 5.0
"""Guidance weight if a configuration has none."""

TOP_KEYS = (
    "model_name",
    "scheduler",
    "method",
    "pipe_kwargs",
    "ip_adapter_scale",
    "faceid_lora_scale",
    "patch_pipe",
    "am_patch_kwargs",
    "reset_gs_to_default",
    "prompt",
    "negative_prompt",
    "seed",
    "dataset_meta",
    "t2i",
)
PIPE_KEYS = ("num_inference_steps", "guidance_scale_a", "guidance_scale_b", "width", "height", "dcg_kwargs")
DCG_KEYS = (
    "dcg_type",
    "term_preproc",
    "term_postproc",
    "rescale",
    "a_scheduler",
    "b_scheduler",
    "sch_kwargs",
    "return_norms",
)
PATCH_KEYS = (
    "target_parts",
    "target_tokens",
    "target_tsteps",
    "am_transforms",
    "inverse_neg_transforms",
    "apply_schedule",
    "apply_adain",
)


def convert(tree: Node) -> Node:
    """Convert a published configuration to a recipe that extends the recipe of its model.

    Args:
        tree: the JSON object, with marks.

    Raises:
        RecipeError: an unknown key, schedule, transform or model, naming file and line.
    """
    top = _Part(tree, "", TOP_KEYS)
    row = _row(top)
    _supported(top)
    pipe = top.part("pipe_kwargs", PIPE_KEYS)
    recipe: dict[Key, Node] = {
        "extends": mark_tree(
            f"models/{row}", top.mark("scheduler" if top.has("scheduler") else "model_name")
        ),
        "summary": Node("a configuration of the published code", tree.mark),
        "guidance": _guidance(pipe, row, reset=top.true("reset_gs_to_default")),
        "attention": _attention(top, pipe),
    }
    _copy(top, recipe, ("prompt", "negative_prompt", "seed"))
    for name, source, keys in (
        ("sampling", pipe, {"steps": "num_inference_steps", "width": "width", "height": "height"}),
        ("adapter", top, {"scale": "ip_adapter_scale", "lora_scale": "faceid_lora_scale"}),
    ):
        values: dict[Key, Node] = {
            field: source.entries[key] for field, key in keys.items() if source.has(key)
        }
        recipe[name] = Node(values, source.node.mark)
    return Node(recipe, tree.mark)


class _Part:
    """One JSON object whose keys are all known."""

    def __init__(self, node: Node, name: str, known: tuple[str, ...]) -> None:
        self.node = node
        self.name = name
        if not isinstance(node.value, dict):
            _fail(node, name, "must be an object")
        self.entries = mapping(node)
        for key, child in self.entries.items():
            if key not in known:
                near = nearest(str(key), known)
                hint = f"did you mean '{near}'?" if near else f"valid here: {', '.join(known)}"
                _fail(child, self.dotted(str(key)), "unknown key", hint)

    def dotted(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def has(self, key: str) -> bool:
        """Whether a key is present and not null."""
        return key in self.entries and self.entries[key].value is not None

    def part(self, key: str, known: tuple[str, ...]) -> _Part:
        node = self.entries[key] if self.has(key) else Node({}, self.node.mark)
        return _Part(node, self.dotted(key), known)

    def mark(self, key: str) -> Mark:
        return self.entries[key].mark if key in self.entries else self.node.mark

    def true(self, key: str) -> bool:
        """The value of a flag; false if absent."""
        value = self.entries[key].value if self.has(key) else False
        if not isinstance(value, bool):
            _fail(self.entries[key], self.dotted(key), "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.entries[key].value if self.has(key) else default
        if not isinstance(value, str):
            _fail(self.entries[key], self.dotted(key), "must be text")
        return value


def _fail(node: Node, field: str, problem: str, hint: str | None = None) -> NoReturn:
    place = f"{node.mark.where}: field {field}" if field else node.mark.where
    raise RecipeError(f"{place}: {problem}", hint)


def _one_of(node: Node, field: str, choices: tuple[str, ...]) -> str:
    if not isinstance(node.value, str) or node.value not in choices:
        near = nearest(str(node.value), choices)
        shown = repr(node.value) if isinstance(node.value, str | int | float | None) else "this"
        hint = f"did you mean '{near}'?" if near else None
        _fail(node, field, f"must be one of {', '.join(choices)}, not {shown}", hint)
    return node.value


def _row(top: _Part) -> str:
    """The model's recipe: `scheduler`, or `model_name` as in the published configurations."""
    given = {key: _one_of(top.entries[key], key, ROWS) for key in ("scheduler", "model_name") if top.has(key)}
    if not given:
        _fail(top.node, "model_name", "is missing", f"name the model: one of {', '.join(ROWS)}")
    if len(set(given.values())) > 1:
        _fail(top.entries["model_name"], "model_name", f"contradicts scheduler '{given['scheduler']}'")
    return next(iter(given.values()))


def _supported(top: _Part) -> None:
    if top.text("method", "faceid") != "faceid":
        _fail(top.entries["method"], "method", "must be faceid, the only supported adapter")
    if top.true("t2i"):
        _fail(top.entries["t2i"], "t2i", "must be false: images without an identity are not supported")


def _copy(source: _Part, target: dict[Key, Node], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key in source.entries:
            target[key] = source.entries[key]


def _guidance(pipe: _Part, row: str, *, reset: bool) -> Node:
    dcg = pipe.part("dcg_kwargs", DCG_KEYS)
    order = ORDERS[3]
    if dcg.has("dcg_type"):
        node = dcg.entries["dcg_type"]
        if isinstance(node.value, bool) or not isinstance(node.value, int) or node.value not in ORDERS:
            _fail(
                node, dcg.dotted("dcg_type"), "must be 1 (text first), 2 (independent) or 3 (identity first)"
            )
        order = ORDERS[node.value]
    arguments = dcg.part("sch_kwargs", ("a", "b", "custom"))
    identity, text = ("a", "b") if order == "identity_first" else ("b", "a")
    reset_to = {"lcm": 1.5, "base": 5.0}.get(row, 1.0) if reset else None
    rescale = mark_tree(0.0, dcg.mark("term_postproc"))
    if dcg.text("term_postproc", "").startswith("rescale"):
        rescale = dcg.entries["rescale"] if dcg.has("rescale") else mark_tree(RESCALE, rescale.mark)
    return Node(
        {
            "order": mark_tree(order, dcg.mark("dcg_type")),
            "identity": _weight(pipe, dcg, arguments, identity, reset_to),
            "text": _weight(pipe, dcg, arguments, text, reset_to),
            "renorm": mark_tree("renorm" in dcg.text("term_preproc", ""), dcg.mark("term_preproc")),
            "rescale": rescale,
        },
        dcg.node.mark,
    )


def _weight(pipe: _Part, dcg: _Part, arguments: _Part, letter: str, reset_to: float | None) -> Node:
    """Weight `a` or `b`: a constant, a list, or a function scaled by the constant."""
    key, chosen = f"guidance_scale_{letter}", f"{letter}_scheduler"
    scale = mark_tree(WEIGHT, pipe.node.mark)
    if reset_to is not None:
        scale = mark_tree(reset_to, pipe.mark(key))
    elif pipe.has(key):
        scale = pipe.entries[key]
    if not dcg.has(chosen):
        return scale
    name = _one_of(dcg.entries[chosen], dcg.dotted(chosen), SCHEDULERS)
    if name == "default":
        return scale
    if name == "custom":
        lists = arguments.part("custom", ("a", "b"))
        if not lists.has(letter) or not isinstance(lists.entries[letter].value, list):
            place = lists.entries.get(letter, lists.node)
            _fail(
                place, lists.dotted(letter), f"must be a list with one number per step, for {chosen} 'custom'"
            )
        return lists.entries[letter]
    given = arguments.part(letter, ("c", "s"))
    function: dict[Key, Node] = {"scale": scale}
    for field, value in FUNCTIONS[name].items():
        if value in ("c", "s"):
            argument = str(value)
            if not given.has(argument):
                _fail(given.node, given.dotted(argument), f"is missing, and {chosen} '{name}' needs it")
            function[field] = given.entries[argument]
        else:
            function[field] = mark_tree(value, dcg.mark(chosen))
    return Node(function, dcg.mark(chosen))


def _attention(top: _Part, pipe: _Part) -> Node:
    if not top.true("patch_pipe"):
        return mark_tree({"transforms": []}, top.mark("patch_pipe"))
    if not top.has("am_patch_kwargs"):
        _fail(top.entries["patch_pipe"], "am_patch_kwargs", "is missing, and patch_pipe is true")
    patch = top.part("am_patch_kwargs", PATCH_KEYS)
    blocks = _listed(patch, "target_parts")
    if blocks is None or not blocks.value:
        # The published code treats an absent or empty list as all parts.
        blocks = mark_tree(["down", "mid", "up"], patch.mark("target_parts"))
    scheduled = patch.true("apply_schedule")
    if scheduled and any(block.value == "mid" for block in _items(blocks)):
        _fail(blocks, patch.dotted("target_parts"), "includes mid, for which apply_schedule has no values")
    attention: dict[Key, Node] = {
        "transforms": _transforms(patch, SCHEDULED if scheduled else TRANSFORMS),
        "blocks": _sorted(blocks, ["down", "mid", "up"]),
        "steps": _steps(patch, pipe),
        "invert_token_0": mark_tree(
            patch.true("inverse_neg_transforms"), patch.mark("inverse_neg_transforms")
        ),
        "normalisation": mark_tree("joint", patch.node.mark),
    }
    tokens = _listed(patch, "target_tokens")
    if tokens is not None:
        attention["tokens"] = _sorted(tokens, [0, 1, 2, 3])
    if patch.true("apply_adain"):
        attention["blend"] = mark_tree({"weight": 0.7, "eps": 1e-6}, patch.mark("apply_adain"))
    return Node(attention, patch.node.mark)


def _listed(part: _Part, key: str) -> Node | None:
    if not part.has(key):
        return None
    node = part.entries[key]
    if not isinstance(node.value, list):
        _fail(node, part.dotted(key), "must be a list")
    return node


def _items(node: Node) -> list[Node]:
    return node.value if isinstance(node.value, list) else []


def _sorted(node: Node, order: list[Any]) -> Node:
    """Sort known values, so that equal choices have equal digests. Unknown values are kept for the
    validation to report."""
    items = _items(node)
    if all(not isinstance(item.value, bool | float | dict | list) and item.value in order for item in items):
        items = sorted(items, key=lambda item: order.index(item.value))
    return Node(items, node.mark)


def _steps(patch: _Part, pipe: _Part) -> Node:
    listed = _listed(patch, "target_tsteps")
    if listed is None:
        return mark_tree("all", patch.mark("target_tsteps"))
    count = pipe.entries["num_inference_steps"].value if pipe.has("num_inference_steps") else 4
    values = [item.value for item in listed.value] if isinstance(listed.value, list) else []
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if whole and isinstance(count, int) and count == len(values) and set(values) == set(range(count)):
        return mark_tree("all", listed.mark)
    return listed


def _transforms(patch: _Part, table: dict[str, dict[str, Plain]]) -> Node:
    listed = _listed(patch, "am_transforms")
    if listed is None:
        _fail(patch.node, patch.dotted("am_transforms"), "is missing", f"a list of {', '.join(table)}")
    return Node(
        [
            mark_tree(dict(table[_one_of(item, patch.dotted("am_transforms"), tuple(table))]), item.mark)
            for item in _items(listed)
        ],
        listed.mark,
    )
