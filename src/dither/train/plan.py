"""Which weight is treated how: an ordered list of ``glob -> spec``, the first match wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dither.activations import Activation, Gradient, site_from_json
from dither.core import Encoder, SpecError
from dither.model import collect
from dither.train.method import Method, spec_from_json, spec_to_json

Spec = Encoder | Method
Rule = Spec | Activation | Gradient

_WILD = set("*?[]!")
_WANTED = (
    'a plan maps globs to formats, encoders and training methods, {"*.weight": LSQ(4)} say, '
    "and globs with an @ to activations and gradients"
)


@dataclass(frozen=True)
class Plan:
    """An ordered ``glob -> spec``; the first glob that matches a tensor's name wins.

    Globs are those of :mod:`fnmatch`, case-sensitive, against full names such as
    ``encoder.layer.0.output.dense.weight``. They match floating-point *parameters*. Buffers must be
    named: a rule matches one only if what follows the last dot of the glob matches the buffer's own
    name and is more than a wildcard: ``"*.running_mean"``, ``"*running_*"``, but not ``"*"``.

    Globs with an ``@`` are about activations and gradients: ``"*.dense@in"``, see
    :mod:`dither.activations`. All others are about weights.

    Attributes:
        rules: globs and specs.
        owners: for weights that another module's ``forward`` reads than the one that holds them,
            ``{parameter: path of that module}``, ``""`` for the whole model.

    >>> from dither.formats import Affine, Raw
    >>> plan = Plan({"*.bias": Raw(), "*": Affine(4)})
    >>> plan.find("fc.bias"), Plan.from_json(plan.to_json()) == plan
    (Raw(dtype=None), True)
    """

    rules: Mapping[str, Rule]
    owners: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rules(self.rules, self.owners)

    def __iter__(self) -> Iterator[tuple[str, Rule]]:
        return iter(self.rules.items())

    def find(self, name: str, *, is_buffer: bool = False) -> Spec | None:
        """The spec for a tensor, or None: it is then stored raw."""
        return self._spec(self._rule(name, is_buffer=is_buffer))

    def resolve(self, model: nn.Module) -> dict[str, Spec]:
        """The spec for each floating-point parameter and named buffer that a rule matches.

        A tied weight stands under the first of its names.

        Raises:
            SpecError: two names of a tied weight match rules that differ, or a rule names a
                tensor that does not exist.
        """
        tensors = collect(model)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        found: dict[str, Spec] = {}
        used: set[str] = set()
        rules: dict[str, tuple[str, str | None]] = {}
        for name in [*tensors.values, *tensors.aliases]:
            target = tensors.aliases.get(name, name)
            if not tensors.values[target].is_floating_point():
                self._refuse_named(name, tensors.values[target])
                continue
            rule = self._rule(name, is_buffer=name not in parameters)
            used |= {rule} if rule is not None else set()
            first, other = rules.setdefault(target, (name, rule))
            if self._spec(rule) != self._spec(other):
                raise SpecError(
                    f"{first!r} and {name!r} are the same tensor, but the rules {other!r} and "
                    f"{rule!r} treat them differently; give both the same spec"
                )
            spec = self._spec(rule)
            if spec is not None:
                found[target] = spec
        self._refuse_unused(used, tensors.values)
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the order of the rules is kept."""
        rules = [[glob, _to_json(spec)] for glob, spec in self.rules.items()]
        return {"rules": rules, **({"owners": dict(self.owners)} if self.owners else {})}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        try:
            rules = {glob: _from_json(spec) for glob, spec in values["rules"]}
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(
                'a plan in JSON is {"rules": [[glob, spec], ...], "owners": {...}}, not '
                f"{str(values)[:200]}"
            ) from error
        return cls(rules, dict(values.get("owners", {})))

    def _rule(self, name: str, *, is_buffer: bool) -> str | None:
        for glob in self._of_weights():
            if fnmatchcase(name, glob) and (not is_buffer or _names(glob, name)):
                return glob
        return None

    def _spec(self, rule: str | None) -> Spec | None:
        return None if rule is None else self._of_weights()[rule]

    def _of_weights(self) -> dict[str, Spec]:
        return {
            glob: spec
            for glob, spec in self.rules.items()
            if not isinstance(spec, Activation | Gradient)
        }

    def _refuse_named(self, name: str, tensor: Tensor) -> None:
        """Plain globs pass over what is no floating point; a rule that is its name does not."""
        for glob in self._of_weights():
            if not set(glob) & _WILD and glob == name:
                raise SpecError(
                    f"the rule {glob!r} names a tensor of {tensor.dtype}, and only floating-point "
                    "tensors are quantized: it is stored as it is, so leave it out of the plan "
                    "(complex weights can be kept as two real parameters)"
                )

    def _refuse_unused(self, used: set[str], tensors: Mapping[str, Tensor]) -> None:
        own = ", ".join(list(tensors)[:6])
        globs = self._of_weights()
        for glob in globs:
            if glob not in used and not set(glob) & _WILD:
                if any(fnmatchcase(name, glob) for name in tensors):
                    continue  # an earlier rule takes it
                raise SpecError(
                    f"the rule {glob!r} names a tensor that the model does not have; its tensors "
                    f"are {own}, ..."
                )
        if globs and not used:
            raise SpecError(
                f"the plan's rules {', '.join(map(repr, list(globs)[:6]))} match no parameter; the "
                f"model's tensors are {own}, ... (buffers and integers are matched by no wildcard)"
            )


def _check_rules(rules: object, owners: object) -> None:
    """Refuse what is no plan at all, whatever the model."""
    if not isinstance(rules, Mapping) or not isinstance(owners, Mapping):
        raise SpecError(f"{_WANTED}, and owners parameters to paths; not {rules!r}"[:400])
    for glob, spec in rules.items():
        if isinstance(spec, type):
            raise SpecError(
                f"the rule {glob!r} has the class {spec.__name__} in place of an instance; "
                f"write {spec.__name__}(...) with its settings"
            )
        is_site, is_about_sites = isinstance(glob, str) and "@" in glob, _is_about_sites(spec)
        if is_site and not is_about_sites:
            raise SpecError(
                f"the glob {glob!r} is about activations, and takes Activation(...) or "
                f"Gradient(...), not {spec!r}"
            )
        # A text has a method `encode` too.
        is_spec = isinstance(spec, Encoder | Method) and not isinstance(spec, str | bytes)
        if not isinstance(glob, str) or is_site != is_about_sites or not (is_spec or is_site):
            raise SpecError(f"{_WANTED}; not {glob!r} to {spec!r}"[:400])


def _is_about_sites(spec: object) -> bool:
    return isinstance(spec, Activation | Gradient)


def _to_json(spec: Rule) -> dict[str, Any]:
    return spec.to_json() if isinstance(spec, Activation | Gradient) else spec_to_json(spec)


def _from_json(values: Mapping[str, Any]) -> Rule:
    return site_from_json(values) if "site" in values else spec_from_json(values)


def _names(glob: str, name: str) -> bool:
    """Whether a glob names a buffer: its last part matches the buffer's own name, with letters."""
    last = glob.rpartition(".")[2]
    return bool(set(last) - _WILD) and fnmatchcase(name.rpartition(".")[2], last)


def literal(name: str) -> str:
    """A glob that matches only ``name``.

    >>> literal("blocks[0].weight")
    'blocks[[]0].weight'
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def as_plan(plan: Plan | Mapping[str, Rule]) -> Plan:
    """A plan, from the dict that users write.

    Raises:
        SpecError: it is none.
    """
    if isinstance(plan, Plan):
        return plan
    try:
        return Plan(dict(plan))
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{_WANTED}; not {plan!r}"[:400]) from error
