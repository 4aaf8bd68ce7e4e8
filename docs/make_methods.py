"""Writes the tables of all rules and attacks from the code itself.

    python docs/make_methods.py            # README.md's tables and docs/methods.md
    python docs/make_methods.py --check    # fails where they are not up to date

What a method is, its paper, its cost and how it differs from the paper come from its
docstring; what it requires of n and f, remembers and needs, from calling it.
"""

import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import fedjax_sim as fs

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- methods: written by docs/make_methods.py -->"
END = "<!-- end of methods -->"
REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "Aggregators": fs.aggregators.REGISTRY,
    "Pre-aggregators": fs.aggregators.PRE_AGGREGATORS,
    "Client defenses": fs.client_defenses.CLIENT_DEFENSES,
    "Attacks on updates": fs.attacks.UPDATE_ATTACKS,
    "Attacks on data": fs.attacks.DATA_ATTACKS,
    "Attacks on series": fs.attacks.SERIES_ATTACKS,
}
# Sizes that no option has by chance: parameters, clients, samples of a client.
D, N, M = 7919, 104729, 1009
# Values for options without a default, by their name.
GIVEN: dict[str, Any] = {
    "max_byzantine": 0,
    "num_classes": 10,
    "num_clusters": 10,
    "target": 0,
    "source": 1,
    "flip_target": 2,
    "factor": 10.0,
    "value": 1.0,
    "threshold": 1,
    "bound": 1.0,
    "radius": 1.0,
    "num_channels": 2,
    "detector": fs.client_defenses.Detector({}, (), ()),
    "calibration": fs.client_defenses.Calibration(
        fs.client_defenses.Scale(jnp.zeros(N), jnp.ones(N)), jnp.zeros(N)
    ),
}
# Conditions on n clients of which f are assumed, or m are, Byzantine; the first that
# agrees with `validate` everywhere is what the table says.
CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "n >= 1": lambda n, f: True,
    "n >= 2": lambda n, f: n >= 2,
    "n >= 3": lambda n, f: n >= 3,
    "n >= threshold (4)": lambda n, f: n >= 4,
    "n > f": lambda n, f: n > f,
    "n > 2f": lambda n, f: n > 2 * f,
    "n > 2f, C(n, f) <= 10^6": lambda n, f: n > 2 * f and math.comb(n, f) <= 1e6,
    "n >= 2f + 3": lambda n, f: n >= 2 * f + 3,
    "n >= 4f + 3": lambda n, f: n >= 4 * f + 3,
    "n >= 3, m <= n / 2": lambda n, m: m == 0 or (n >= 3 and m <= n // 2),
    "m = 0 or n >= 2m + 3": lambda n, m: m == 0 or n >= 2 * m + 3,
}
SIZES = [(n, f) for n in range(1, 45) for f in range(12)]
# Context fields that every round has, and that say nothing of what a study must supply.
USUAL = {
    "byzantine",
    "client_ids",
    "num_samples",
    "round",
    "params",
    "previous_params",
    "previous_aggregate",
    "mask",
}
NEEDS = {
    "root_update": "root data",
    "root_scores": "root data",
    "pretrain": "root data, pre-training",
    "key": "randomness",
    "aggregate": "tries the rule",
    "features": "the model's shallow features",
}


def sections(factory: Callable[..., Any]) -> dict[str, str]:
    """The docstring's paragraphs by the heading they stand under, "" for the first."""
    text = inspect.cleandoc(factory.__doc__ or "")
    heading = r"^(Cost|Assumptions|Threat model|Args|Returns|Raises|Example|References"
    heading += r"|Differs from [a-z ]+):[ \n]"
    parts = re.split(heading, text, flags=re.MULTILINE)
    found = {"": parts[0]}
    for name, body in zip(parts[1::2], parts[2::2]):
        name = "Differs" if name.startswith("Differs") else name
        found[name] = "\n\n".join(
            " ".join(line.strip() for line in paragraph.splitlines()).strip()
            for paragraph in re.split(r"\n\s*\n", body)
        ).strip()
    return found


def paper(references: str) -> str:
    """``First author et al., Venue year`` of the first reference.

    Of one without authors, which starts with its title, the title's first word.
    """
    first = references.split("\n\n")[0]
    if first.startswith('"'):
        return re.split(r"[,:]", first[1:])[0]
    match = re.match(
        r'(?P<authors>[^"]+),? "[^"]+",? (?P<venue>.+?\b(19|20)\d\d)\b(?!\.\d)', first
    )
    if not match:
        raise ValueError(
            f"a reference needs authors, a title in quotes, venue and year: {first}"
        )
    authors = re.split(r",| and ", match["authors"].strip(" ,"))
    surname = re.sub(r"^((?:[A-Z]\.[- ]?)+\s*)+", "", authors[0].strip())
    venue = match["venue"].strip()
    return f"{surname}{' et al.' if len(authors) > 1 else ''}, {venue}"


def options(factory: Callable[..., Any], **given: Any) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.values()
    missing = {p.name for p in parameters if p.default is p.empty}
    known = {p.name for p in parameters}
    return {name: GIVEN[name] for name in missing} | {
        k: v for k, v in given.items() if k in known
    }


def accepts(call: Callable[[], None]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except ValueError:
        return False
    return True


def condition(accepted: Mapping[tuple[int, int], bool], name: str) -> str:
    """What ``validate`` demands, as the first condition that agrees everywhere."""
    for text, holds in CONDITIONS.items():
        if all(holds(n, f) == ok for (n, f), ok in accepted.items()):
            return text
    raise ValueError(f"{name}: no condition of CONDITIONS agrees with its validate")


def rule_condition(name: str, factory: Callable[..., Any]) -> str:
    return condition(
        {
            (n, f): accepts(
                lambda n=n, f=f: factory(**options(factory, max_byzantine=f)).validate(
                    n
                )
            )
            for n, f in SIZES
        },
        name,
    )


def state(init: Callable[[], Any]) -> str:
    """What is remembered between rounds, by size: d parameters, N clients of m."""
    leaves = jax.tree.leaves(jax.eval_shape(init))
    names = {D: "d", N: "N", M: "m"}
    shapes = [[names.get(size, str(size)) for size in leaf.shape] for leaf in leaves]
    words = [" x ".join(shape) or "1" for shape in shapes]
    return ", ".join(sorted(set(words), key=words.index)) or "-"


def state_of(rule: fs.types.Aggregator) -> str:
    if rule.pretrain is not None:
        return "what it learned"
    return state(lambda: rule.init(jnp.zeros(D), N))


def strength(factory: Callable[..., Any], attack: fs.types.UpdateAttack) -> str:
    """The option whose value is the attack's state, also where it must be given."""
    if attack.strength:
        return f"`{attack.strength}`"
    known = inspect.signature(factory).parameters
    for option in {"z", "scale"} & set(known):
        if factory(**{option: 1.0}).strength == option:
            return f"`{option}`, if given"
    return "-"


def needs(names: frozenset[str]) -> str:
    return ", ".join(NEEDS[name] for name in sorted(names - USUAL)) or "-"


def row(name: str, factory: Callable[..., Any], *middle: str) -> tuple[str, ...]:
    found = sections(factory)
    for wanted in ("Cost", "References"):
        if wanted not in found:
            raise ValueError(f"the docstring of {name} has no {wanted}:")
    what = found[""].splitlines()[0].rstrip(".")
    differs = f"[yes](docs/methods.md#{name})" if "Differs" in found else "no"
    cost = found["Cost"].rstrip(".").replace("``", "")
    return (f"`{name}`", what, paper(found["References"]), *middle, cost, differs)


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of text: all columns to the left."""
    return fs.report.markdown_table(header, rows).replace("---:", ":---")


def tables() -> dict[str, str]:
    """Heading -> Markdown table."""
    rules, before, clients, updates, data, series = [], [], [], [], [], []
    for name, factory in sorted(fs.aggregators.REGISTRY.items()):
        rule = factory(**options(factory, max_byzantine=0))
        rules.append(
            row(
                name,
                factory,
                rule_condition(name, factory),
                state_of(rule),
                needs(rule.needs | ({"pretrain"} if rule.pretrain else set())),
            )
        )
    for name, factory in sorted(fs.aggregators.PRE_AGGREGATORS.items()):
        pre = factory(**options(factory))
        before.append(
            row(name, factory, rule_condition(name, factory), "-", needs(pre.needs))
        )
    for name, build in sorted(fs.client_defenses.CLIENT_DEFENSES.items()):
        defense = build(**options(build))
        held = state(lambda own=defense: own.init(jnp.zeros((N, M), bool)))
        clients.append(row(name, build, held, needs(defense.needs)))
    for name, make in sorted(fs.attacks.UPDATE_ATTACKS.items()):
        attack = make(**options(make))
        allowed = {
            (n, m): accepts(lambda a=attack, n=n, m=m: a.validate(n, m))
            for n, m in SIZES
            if m < n
        }
        knowledge = attack.knowledge
        chosen = inspect.signature(make).parameters.get("knowledge")
        if chosen is not None:
            knowledge = "colluding or omniscient"
        updates.append(
            row(
                name,
                make,
                knowledge,
                condition(allowed, name),
                strength(make, attack),
                needs(attack.needs),
            )
        )
    for name, poison in sorted(fs.attacks.DATA_ATTACKS.items()):
        found = poison(**options(poison))
        success = "yes" if found.trigger else "-"
        if name == "label_flip":
            success = "if targeted"
        data.append(row(name, poison, success))
    for name, make in sorted(fs.attacks.SERIES_ATTACKS.items()):
        takes = "target" in inspect.signature(make).parameters
        series.append(row(name, make, "with `target`" if takes else "-"))
    common = ("paper", "needs n, f", "state", "needs")
    end = ("cost", "differs from the paper")
    return {
        "Aggregators": markdown(("", "aggregate", *common, *end), rules),
        "Pre-aggregators": markdown(("", "each row becomes", *common, *end), before),
        "Client defenses": markdown(
            ("", "what clients leave out", "paper", "state", "needs", *end), clients
        ),
        "Attacks on updates": markdown(
            (
                "",
                "what Byzantine clients send",
                "paper",
                "knowledge",
                "needs n, m",
                "strength",
                "needs",
                *end,
            ),
            updates,
        ),
        "Attacks on data": markdown(
            ("", "what Byzantine clients train on", "paper", "success rate", *end), data
        ),
        "Attacks on series": markdown(
            ("", "what becomes of a series", "paper", "success rate", *end), series
        ),
    }


def readme(text: str) -> str:
    """README.md with its tables as they should be."""
    start, rest = text.split(BEGIN)
    _, end = rest.split(END)
    body = "\n\n".join(f"**{name}**\n\n{table}" for name, table in tables().items())
    return f"{start}{BEGIN}\n\n{body}\n\n{END}{end}"


def page() -> str:
    """docs/methods.md: papers and deviations in full."""
    parts = [
        "# Rules and attacks: papers and deviations",
        "Written by `python docs/make_methods.py` from the docstrings, which also hold "
        "equations, options, errors and examples (`help(fs.aggregators.krum)`).",
    ]
    for heading, registry in REGISTRIES.items():
        parts.append(f"## {heading}")
        for name, factory in sorted(registry.items()):
            found = sections(factory)
            parts += [f"### {name}", found[""].splitlines()[0]]
            for key in ("Assumptions", "Threat model"):
                if key in found:
                    parts.append(f"*{key}:* {found[key]}")
            parts.append(found["References"])
            if "Differs" in found:
                parts.append(f"*Differs from the paper:* {found['Differs']}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    files = {
        ROOT / "README.md": readme((ROOT / "README.md").read_text()),
        ROOT / "docs" / "methods.md": page(),
    }
    for path, text in files.items():
        if path.exists() and path.read_text() == text:
            continue
        if "--check" in sys.argv[1:]:
            sys.exit(f"{path.name} is not up to date: run python docs/make_methods.py")
        path.write_text(text)


if __name__ == "__main__":
    main()
