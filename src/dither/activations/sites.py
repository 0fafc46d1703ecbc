"""Where activations are quantized: at a module's ends, and at functions that it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dither.activations.functions import (
    RESERVED,
    apart,
    asks_function,
    is_function,
    own_modules,
    trace,
    untrace,
)
from dither.activations.gradients import GradientQuantizer
from dither.activations.quantizer import Quantizer
from dither.activations.site_spec import Gradient, SiteSpec
from dither.core import SpecError
from dither.model import SITES

ENDS = ("in", "out", "grad")
_WILD = set("*?[]!")

Rules = Mapping[str, Any] | Iterable[tuple[str, Any]]


class Site(nn.Module):
    """The identity, where activations are to be quantized that no module takes or gives.

    Call it in `forward`; its sites are ``path@in`` and ``path@out``, which are the same tensor.
    Sums, products and softmaxes have sites without it, ``path@add`` and so on.
    """

    def forward(self, values: Tensor) -> Tensor:
        """``values`` themselves."""
        return values


class _Sites(nn.ModuleDict):
    """A module's quantizers by end. As one of the children that a Sequential calls, no change.

    Names of children have no dot: what is at ``add.1`` is the child ``add_1``.
    """

    def forward(self, values: Any) -> Any:
        return values

    def __getitem__(self, end: str) -> nn.Module:
        return super().__getitem__(end.replace(".", "_"))

    def __setitem__(self, end: str, module: nn.Module) -> None:
        super().__setitem__(end.replace(".", "_"), module)

    def __contains__(self, end: str) -> bool:
        return super().__contains__(end.replace(".", "_"))

    def items(self) -> Any:
        return [(name.replace("_", "."), module) for name, module in self._modules.items()]


def resolve(model: nn.Module, rules: Rules, functions: Iterable[str] = ()) -> dict[str, SiteSpec]:
    """The spec of each site that a rule matches; the first match wins.

    Rules whose globs hold no ``@`` are about weights and passed over. Modules that hold others are
    matched only by a glob that names them: ``"*.attention@out"`` or ``"*layer.?@in"``, not
    ``"*@in"``.

    Args:
        model: any module.
        rules: ``glob -> Activation or Gradient``, as a dict or a :class:`dither.Plan`.
        functions: sites of functions that are known to run, see :func:`functions`; those that are
            quantized already, and those that a rule names without wildcards, count as well.

    Raises:
        SpecError: a rule names a site that does not exist, or has the wrong kind of spec.
    """
    table = [
        (g, s) for g, s in (rules.items() if isinstance(rules, Mapping) else rules) if "@" in g
    ]
    for glob, spec in table:
        _check(glob, spec)
    used: set[str] = set()
    found: dict[str, SiteSpec] = {}
    names = [(f"{path}@{end}", is_leaf) for path, is_leaf in _modules(model) for end in ENDS]
    known = _functions(model, table, functions)
    for name, is_leaf in [*names, *((name, True) for name in known)]:
        for glob, spec in table:
            is_kind = isinstance(spec, Gradient) == name.endswith("@grad")
            is_kind &= asks_function(glob) == (name in known)
            if is_kind and fnmatchcase(name, glob) and (is_leaf or _names(glob, name)):
                used.add(glob)
                found[name] = spec
                break
    for glob, _ in table:
        if glob in used or any(fnmatchcase(name, glob) for name in [*dict(names), *known]):
            continue
        if asks_function(glob):
            raise SpecError(_unknown_function(glob, known))
        raise SpecError(
            f"the rule {glob!r} matches no site; sites are paths of modules with @in, @out or "
            f"@grad, such as {', '.join(name for name, leaf in names[:18:3] if leaf)}, or with a "
            "function: @add, @matmul, @scores or @softmax"
        )
    return found


def _functions(
    model: nn.Module, table: Iterable[tuple[str, object]], functions: Iterable[str]
) -> dict[str, None]:
    """Sites of functions that may be named."""
    known = dict.fromkeys(functions)
    known |= dict.fromkeys(s for s in placed(model) if is_function(s.rpartition("@")[2]))
    paths = {path for path, _ in _modules(model)}
    for glob, _ in table:
        path, _, end = glob.rpartition("@")
        if is_function(end) and path in paths:
            known[glob] = None
    return known


def _unknown_function(glob: str, known: Iterable[str]) -> str:
    return (
        f"the rule {glob!r} matches no function. Sites of functions exist only once a batch ran: "
        "let observe find them and apply its encodings first, or name one exactly, such as "
        f"'layer1.0@add' or 'layer1.0@add.1'. Known so far: {', '.join(known) or 'none'}"
    )


def _modules(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Path of each module, and whether it holds no other."""
    for path, module in own_modules(model):
        yield path, not any(name not in RESERVED for name, _ in module.named_children())


def _check(glob: str, spec: object) -> None:
    end = glob.rpartition("@")[2]
    if not isinstance(spec, SiteSpec):
        raise SpecError(
            f"the glob {glob!r} is about activations, and takes Activation(...) or Gradient(...), "
            f"not {spec!r}"
        )
    is_known = asks_function(glob) or any(fnmatchcase(known, end) for known in ENDS)
    if not is_known:
        raise SpecError(
            f"the glob {glob!r} ends in @{end}; sites end in @in, @out or @grad, or in a function: "
            "@add, @matmul, @scores or @softmax, from the second on with a number (@add.1)"
        )
    if (end == "grad") != isinstance(spec, Gradient):
        raise SpecError(
            f"{glob!r}: Gradient(...) goes to sites that end in @grad, Activation(...) to the "
            f"others; not {spec!r}"
        )


def _names(glob: str, name: str) -> bool:
    """Whether a glob names a module: its last part has letters and matches the module's own."""
    last, own = (text.rpartition("@")[0].rpartition(".")[2] for text in (glob, name))
    return not (last or own) or (bool(set(last) - _WILD) and fnmatchcase(own, last))


# --- hooks -------------------------------------------------------------------------------------
# They are functions of this module and find quantizers through the module that they get, so that
# copies and pickles of a model use their own.


def _on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return on_input(module.get_submodule(SITES)["in"], args, kwargs)  # type: ignore[index]


def _on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return on_output(module.get_submodule(SITES)["out"], output)  # type: ignore[index]


def _on_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return on_output(module.get_submodule(SITES)["grad"], output)  # type: ignore[index]


_HOOKS: dict[str, Callable[..., Any]] = {"in": _on_input, "out": _on_output, "grad": _on_gradient}


def on_input(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the first floating-point tensor among a call's arguments."""
    for number, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:number], apart(change, value), *args[number + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, name: apart(change, value)}
    return args, kwargs


def on_output(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Change the first floating-point tensor of what a module returns; the container is kept."""
    if isinstance(output, Tensor):
        return apart(change, output) if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        for number, value in enumerate(output):
            if isinstance(value, Tensor) and value.is_floating_point():
                items = (*output[:number], apart(change, value), *output[number + 1 :])
                named = hasattr(output, "_fields")
                return type(output)(*items) if named else type(output)(items)
    if isinstance(output, Mapping):
        for name, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                output[name] = apart(change, value)  # type: ignore[index]
                break
    return output


def place(model: nn.Module, site: str, quantizer: Quantizer | GradientQuantizer) -> None:
    """Let a site go through a quantizer, in place of another if there is one.

    Raises:
        SpecError: the model has no such site.
    """
    path, _, end = site.rpartition("@")
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise SpecError(f"the model has no module {path!r} for the site {site!r}") from error
    if not (end in _HOOKS or is_function(end)) or SITES in path.split("."):
        raise SpecError(
            f"{site!r} is no site: sites end in @in, @out or @grad, or in a function such as @add"
        )
    if SITES not in module._modules:
        module.add_module(SITES, _Sites())
    held: Any = module._modules[SITES]
    tensor = next(module.parameters(), None)
    if tensor is None:
        tensor = next(model.parameters(), None)
    quantizer.train(module.training)
    is_new = end not in held
    held[end] = quantizer if tensor is None else quantizer.to(tensor.device)
    if not is_new:
        return
    if is_function(end):
        for _, each in own_modules(module):
            trace(each)
    elif end == "in":
        module.register_forward_pre_hook(_HOOKS[end], with_kwargs=True)
    else:
        # Gradients first, so that what is quantized is what comes back to the module itself.
        module.register_forward_hook(_HOOKS[end])


def displace(module: nn.Module) -> None:
    """Take all quantizers from a module, and everything else that was placed."""
    untrace(module)
    if SITES not in module._modules:
        return
    del module._modules[SITES]
    hooks = set(_HOOKS.values())
    for table, further in (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (module._forward_hooks, [module._forward_hooks_with_kwargs]),
    ):
        for key in [key for key, hook in table.items() if hook in hooks]:
            del table[key]
            for flags in further:
                flags.pop(key, None)


def placed(model: nn.Module) -> dict[str, Quantizer | GradientQuantizer]:
    """Quantizers of a model by site."""
    found: dict[str, Quantizer | GradientQuantizer] = {}
    for path, module in model.named_modules():
        if SITES in path.split(".") or SITES not in module._modules:
            continue
        held: Any = module._modules[SITES]
        found.update({f"{path}@{end}": quantizer for end, quantizer in held.items()})
    return found
