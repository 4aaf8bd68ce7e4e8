"""Rules and attacks as the command line names them.

A name may carry options, and steps are joined by ``+``::

    krum                                   a rule with its defaults
    dual_system:gated_mean                 short for dual_system(variant='gated_mean')
    trimmed_mean(trim=0.1)                 with an option
    nnm(max_byzantine=4)+krum              pre-aggregators, then a rule
    sanitization+median                    a client defense, then a rule
    badnets(target=0)+model_replacement    an attack on the data, then on the update
    ipm(epsilon=[0.1, 0.5, 2])             several strengths, run side by side
    my_rules.trimmed_krum(share=0.2)       the function of your own module my_rules.py

``max_byzantine``, ``num_classes`` and ``num_clusters`` are filled in where a factory
requires them, or takes them and no option is given. Option values are Python literals.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import fedjax_sim as fs
from fedjax_sim.data.series import states
from fedjax_sim.registry import lookup
from fedjax_sim.types import (
    Aggregator,
    ClientDefense,
    DataAttack,
    PreAggregator,
    UpdateAttack,
)

NO_ATTACK = "none"
# To try out an attack before the data are loaded: more classes than any data set has.
ANY_CLASSES = 100_000


class Call(NamedTuple):
    """One step of a spec: the factory's name and its options."""

    name: str
    options: dict[str, Any]


class Attack(NamedTuple):
    """What Byzantine clients do, and how strongly.

    Attributes:
        on_data: what they do to their data, or None.
        on_updates: what they do to their updates, or None.
        strengths: values of the update attack's strength to run side by side; empty
            where there is only the one that was given.
    """

    on_data: DataAttack | None
    on_updates: UpdateAttack | None
    strengths: tuple[float, ...] = ()

    @property
    def needs_root(self) -> bool:
        """Whether it cannot do without the server's root dataset."""
        return self.on_updates is not None and self.on_updates.needs_root


def parse(text: str) -> list[Call]:
    """The steps of a spec.

    Raises:
        ValueError: it is not one.

    Example:
        >>> parse("nnm+dual_system(variant='soft', gamma=2)")
        [Call(name='nnm', options={}), Call(name='dual_system', \
options={'variant': 'soft', 'gamma': 2})]
    """
    # name:variant, outside of quotes.
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)
    parts[::2] = [re.sub(r"(\w+):(\w+)", r"\1(variant='\2')", p) for p in parts[::2]]
    try:
        return _steps(ast.parse("".join(parts).strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read {text!r}: {error}. Expected a name, name(option=value, ...), "
            "or several of them joined by +, in quotes for the shell."
        ) from None


def text_of(call: Call) -> str:
    """A step as ``parse`` reads it.

    Example:
        >>> text_of(Call("krum", {"max_byzantine": 2})), text_of(Call("median", {}))
        ('krum(max_byzantine=2)', 'median')
    """
    given = ", ".join(f"{option}={value!r}" for option, value in call.options.items())
    return f"{call.name}({given})" if given else call.name


def _steps(node: ast.expr) -> list[Call]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _steps(node.left) + _steps(node.right)
    if not isinstance(node, ast.Call):
        return [Call(_dotted(node), {})]
    if node.args or any(word.arg is None for word in node.keywords):
        raise ValueError("options are given by name, as in krum(max_byzantine=2)")
    options: dict[str, Any] = {}
    for word in node.keywords:
        name = str(word.arg)
        if name in options:
            raise ValueError(f"option {name} is given twice")
        try:
            options[name] = ast.literal_eval(word.value)
        except ValueError:
            value = ast.unparse(word.value)
            raise ValueError(
                f"{name}={value} is no Python literal such as 2, 0.5, 'text' or [1, 2]"
            ) from None
    return [Call(_dotted(node.func), options)]


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("a name was expected")


def find(kind: str, name: str, table: Mapping[str, Any]) -> Callable[..., Any]:
    """The factory of a name: one of the table, or ``module.function`` of the user's.

    Raises:
        ValueError: there is none.
    """
    module, dot, function = name.rpartition(".")
    if not dot:
        factory: Callable[..., Any] = lookup(kind, name, table)
        return factory
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{name!r}: {module} imports {error.name!r}, which is not installed."
            ) from None
        raise ValueError(
            f"{name!r}: no module {error.name!r}. Start from the folder that holds "
            f"{module.split('.')[0]}.py, or put that folder into PYTHONPATH."
        ) from None
    own: Callable[..., Any] | None = getattr(imported, function, None)
    if own is None:
        raise ValueError(f"{name!r}: {module} has no function {function!r}.")
    if not callable(own):
        raise ValueError(
            f"{name!r} is not a function but of type {type(own).__name__}. Expected "
            "module.function."
        )
    return own


def _build(kind: str, call: Call, table: Mapping[str, Any], usual: dict) -> Any:
    """Calls the factory, with what is usual where it takes it and it is not given."""
    factory = find(kind, call.name, table)
    try:
        signature = inspect.signature(factory)
    except ValueError:
        raise ValueError(
            f"{call.name} is no function whose options can be read."
        ) from None
    try:
        # Not where a given option may stand for it, as trim for f in trimmed_mean.
        taken = {
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty or not call.options
        }
        usual = {k: v for k, v in usual.items() if k in taken}
        signature.bind(**usual | call.options)
    except TypeError as error:
        raise ValueError(
            f"{call.name}: {error}. Its options: {signature}. Write them as "
            f"{call.name}(option=value)."
        ) from None
    try:
        return factory(**usual | call.options)
    except TypeError as error:
        raise ValueError(f"{call.name} with {call.options}: {error}") from None


def make_aggregator(text: str, max_byzantine: int) -> Aggregator:
    """The rule of a spec, with this assumed f.

    Raises:
        ValueError, TypeError: unknown names, options out of range, or a step in the
            wrong place.

    Example:
        >>> make_aggregator("nnm+trimmed_mean", max_byzantine=2).name
        'nnm+trimmed_mean'
    """
    usual = {"max_byzantine": max_byzantine}
    *before, last = parse(text)
    table = fs.aggregators.REGISTRY
    if last.name in fs.aggregators.PRE_AGGREGATORS:
        raise ValueError(
            f"{text!r} ends with {last.name}, a step before a rule. Write "
            f"{last.name}+RULE, as in {last.name}+median."
        )
    rule = _build("aggregator", last, table, usual)
    if not isinstance(rule, Aggregator):
        raise TypeError(_wrong(last.name, "an Aggregator", rule))
    steps = []
    for call in before:
        step = _build("pre-aggregator", call, fs.aggregators.PRE_AGGREGATORS, usual)
        if not isinstance(step, PreAggregator):
            raise TypeError(_wrong(call.name, "a PreAggregator", step))
        steps.append(step)
    return fs.aggregators.chain(*steps, rule) if steps else rule


class Defense(NamedTuple):
    """What clients and server do against attacks: a client defense or None, a rule."""

    on_clients: ClientDefense | None
    rule: Aggregator


def make_defense(
    text: str, max_byzantine: int, usual: Mapping[str, Any] | None = None
) -> Defense:
    """The defense of a spec: a client defense, a rule, or one and then the other.

    After a client defense alone the server takes FedAvg.

    Args:
        text: the spec.
        max_byzantine: f that rules assume.
        usual: options of the client defense that the spec does not give; those that a
            defense does not take are for another one.

    Raises:
        ValueError, TypeError: as for ``make_aggregator``.

    Example:
        >>> defense = make_defense("sanitization+median", 2, {"num_clusters": 10})
        >>> defense.on_clients.name, defense.rule.name
        ('sanitization', 'median')
    """
    call, *_ = parse(text)
    table = fs.client_defenses.CLIENT_DEFENSES
    rules = fs.aggregators.REGISTRY | fs.aggregators.PRE_AGGREGATORS
    if "." not in call.name:  # else it is the user's own rule
        lookup("defense", call.name, {**table, **rules})
    if call.name not in table:
        return Defense(None, make_aggregator(text, max_byzantine))
    options = dict(usual or {})
    if call.name == "fedsecure" and "detector" not in options:
        raise ValueError(
            f"{text!r}: fedsecure screens series by a detector trained on them, which "
            "this study has not. Use python -m experiments.fedsecure_vitals."
        )
    takes = inspect.signature(table[call.name]).parameters
    options = {k: v for k, v in options.items() if k in takes} | call.options
    on_clients = _build("client defense", Call(call.name, options), table, {})
    _, plus, rest = text.partition("+")
    rule = make_aggregator(rest if plus else "fedavg", max_byzantine)
    return Defense(on_clients, rule)


def _wrong(name: str, expected: str, got: Any) -> str:
    return f"{name} must return {expected}; got {type(got).__name__}."


def make_series_attack(text: str, num_channels: int, num_classes: int) -> DataAttack:
    """The attack on series of a spec, whose labels are the states of the first channel.

    Raises:
        ValueError, TypeError: as for ``make_attack``.

    Example:
        >>> make_series_attack("variability(amplitude=1)", 2, 3).name
        'variability'
    """
    calls = parse(text)
    if len(calls) != 1:
        raise ValueError(f"{text!r}: expected one attack on series.")
    (call,) = calls
    given = {"num_channels", "num_classes", "relabel"} & call.options.keys()
    if given:
        raise ValueError(
            f"{text!r}: {sorted(given)[0]} follows from the series and their states. "
            "Drop it."
        )
    options = {"num_channels": num_channels, "relabel": states} | call.options
    if "target" in options:
        options = {"num_classes": num_classes} | options
    attack = _build(
        "attack on series", Call(call.name, options), fs.attacks.SERIES_ATTACKS, {}
    )
    if not isinstance(attack, DataAttack):
        raise TypeError(_wrong(call.name, "a DataAttack", attack))
    attack.validate(num_classes)
    return attack


def make_attack(text: str, num_classes: int) -> Attack:
    """The attack of a spec: at most one on the data and one on the updates.

    Raises:
        ValueError, TypeError: unknown names, options out of range, a list where there
            is no strength, or two attacks of one kind.

    Example:
        >>> attack = make_attack("badnets(target=0)+scaling(factor=[1, 10])", 10)
        >>> attack.on_data.name, attack.on_updates.name, attack.strengths
        ('badnets', 'scaling', (1.0, 10.0))
    """
    if text == NO_ATTACK:
        return Attack(None, None)
    on_data, on_updates = None, None
    strengths: tuple[float, ...] = ()
    table = fs.attacks.DATA_ATTACKS | fs.attacks.UPDATE_ATTACKS
    for call in parse(text):
        lists = {k: v for k, v in call.options.items() if isinstance(v, list)}
        if any(not values for values in lists.values()) or len(lists) > 1:
            raise ValueError(f"{text!r}: expected one list, not empty; got {lists}.")
        first = Call(call.name, {**call.options, **{k: v[0] for k, v in lists.items()}})
        usual = {"num_classes": num_classes}
        attack = _build("attack", first, table, usual)
        strength = getattr(attack, "strength", "")
        for option, values in lists.items():
            if option != strength:
                can = f"only {strength} can" if strength else "nothing here can"
                raise ValueError(
                    f"{text!r}: {option} cannot be a list, {can}: the strengths of a "
                    "list run in one program, and for that a strength must be the "
                    "attack's state. Run it once for each value."
                )
            as_run = {float(np.float32(v)) for v in values if _is_number(v)}
            if len(as_run) < len(values):
                raise ValueError(
                    f"{text!r}: {option} must be a list of different numbers; got "
                    f"{values}."
                )
            for value in values:  # each is checked as if it were alone
                _build(
                    "attack",
                    Call(call.name, {**call.options, option: value}),
                    table,
                    usual,
                )
            strengths = tuple(float(value) for value in values)
        if isinstance(attack, DataAttack) and on_data is None:
            on_data = attack
        elif isinstance(attack, UpdateAttack) and on_updates is None:
            on_updates = attack
        elif isinstance(attack, DataAttack | UpdateAttack):
            raise ValueError(f"{text!r} has two attacks of one kind. Drop one.")
        else:
            raise TypeError(_wrong(call.name, "an UpdateAttack or DataAttack", attack))
    return Attack(on_data, on_updates, strengths)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def schedule(attack: Attack, start: int, stop: int | None, every: int) -> Attack:
    """The attack in rounds ``start``, ``start + every``, ... before ``stop`` only.

    Raises:
        ValueError: no such round.
    """
    if (start, stop, every) == (0, None, 1):
        return attack
    on_data, on_updates, _ = attack
    if on_data is not None:
        on_data = fs.attacks.schedule(on_data, start, stop, every)
    if on_updates is not None:
        on_updates = fs.attacks.schedule(on_updates, start, stop, every)
    return attack._replace(on_data=on_data, on_updates=on_updates)


def make_partition(text: str) -> fs.data.Partition:
    """The partition of a spec, such as ``label_bias(q=0.5)``.

    Raises:
        ValueError, TypeError: an unknown name, or options out of range.
    """
    call, *more = parse(text)
    if more:
        raise ValueError(f"{text!r}: a partition has one step only.")
    partition: fs.data.Partition = _build("partition", call, fs.data.PARTITIONS, {})
    return partition


def source_hash(text: str) -> str:
    """Hash of the user's own modules in a spec; "" where it names none.

    A result of a function that was changed since is not taken for one of it: what a
    module takes from others of its package, or of its folder, counts with it.
    """
    digest = ""
    for call in parse(text) if text != NO_ATTACK else []:
        module = call.name.rpartition(".")[0]
        if module:
            content = hashlib.sha256()
            for path in sorted(_own_sources(importlib.import_module(module))):
                content.update(path.read_bytes())
            digest += content.hexdigest()[:8]
    return digest


def _own_sources(module: ModuleType) -> set[Path]:
    """The file of a module, and of those of its folder that its names come from."""
    top = sys.modules[module.__name__.split(".")[0]]
    folder = Path(inspect.getfile(top if top.__file__ else module)).resolve().parent
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        each = waiting.pop()
        file = getattr(each, "__file__", None)
        if not file or each.__name__.split(".")[0] in ("fedjax_sim", "experiments"):
            continue
        path = Path(file).resolve()
        inside = path.is_relative_to(folder) and "site-packages" not in (
            path.relative_to(folder).parts
        )
        if path in found or not inside:
            continue
        found.add(path)
        for value in list(vars(each).values()):
            name = value.__name__ if inspect.ismodule(value) else None
            name = name or getattr(value, "__module__", None)
            if isinstance(name, str) and name in sys.modules:
                waiting.append(sys.modules[name])
    return found
