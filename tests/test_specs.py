"""Rules, attacks and partitions by the names of the command line."""

import sys

import jax.numpy as jnp
import pytest

from experiments import specs
from fedjax_sim.types import RoundContext

MINE = '''
"""The user's own functions."""

import fedjax_sim as fs


def strict(max_byzantine, share=0.5):
    return fs.aggregators.trimmed_mean(max_byzantine + int(share > 0.5))


def flip(scale=1.0):
    return fs.attacks.sign_flip(scale)


def wrong():
    return 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine_for_specs", raising=False)
    (tmp_path / "mine_for_specs.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "mine_for_specs.py"


def test_options_and_steps():
    calls = specs.parse("nnm(max_byzantine=3) + krum(neighbours='n-f', squared=False)")
    assert calls == [
        ("nnm", {"max_byzantine": 3}),
        ("krum", {"neighbours": "n-f", "squared": False}),
    ]
    assert specs.parse("sign_flip(scale=-2.5)") == [("sign_flip", {"scale": -2.5})]


def test_variant_is_an_option():
    long, short = "dual_system(variant='soft')", "dual_system:soft"
    assert specs.parse(long) == specs.parse(short)


@pytest.mark.parametrize(
    "text",
    ["", "krum(", "krum(2)", "krum(**x)", "krum+", "1", "krum-median", "a.b()()"],
)
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match="cannot read"):
        specs.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trimmed_mean", 53 / 3),
        ("trimmed_mean(max_byzantine=2)", 2.0),
        ("trimmed_mean(trim=0.4)", 2.0),
    ],
)
def test_assumed_f_is_filled_in_unless_given(text, expected):
    U = jnp.array([[0.0], [1.0], [2.0], [50.0], [60.0]])
    rule = specs.make_aggregator(text, 1)
    aggregate = rule.apply(U, rule.init(U[0], 5), RoundContext())[0]
    assert float(aggregate[0]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("krumm", "Did you mean 'krum'"),
        ("krum(max_byzantin=2)", "unexpected keyword argument 'max_byzantin'"),
        ("krum(max_byzantine=-1)", "integer of at least 0"),
        ("krum+median", "unknown pre-aggregator 'krum'"),
        ("nnm", "ends with nnm, a step before a rule. Write nnm\\+RULE"),
        ("median+nnm", "ends with nnm, a step before a rule"),
        ("sys.flags", "is not a function but of type flags"),
        ("builtins.int", "is no function whose options can be read"),
        ("krum(max_byzantine=nan)", "max_byzantine=nan is no Python literal"),
        ("krum(max_byzantine=1, max_byzantine=2)", "given twice|repeated"),
        ("median(even=[1])", r"unknown median of an even count \[1\]"),
        ("dual_system(variant='a:b')", "unknown dual_system variant 'a:b'"),
        ("no_such_module_here.rule", "no module 'no_such_module_here'"),
        ("math.no_such_function", "math has no function"),
    ],
)
def test_bad_aggregators(text, message):
    with pytest.raises(ValueError, match=message):
        specs.make_aggregator(text, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ipmm", "Did you mean 'ipm'"),
        ("scaling", "missing a required argument: 'factor'"),
        ("ipm(epsilon=[])", "expected one list, not empty"),
        ("ipm(knowledge=['omniscient'])", "knowledge cannot be a list, only epsilon"),
        ("label_flip(fraction=[0.5, 1])", "nothing here can"),
        ("ipm(epsilon=[0.1, -1])", "epsilon must be"),
        ("ipm+alie", "two attacks of one kind"),
        ("alie(z=[1, None])", "list of different numbers"),
        ("ipm(epsilon=[1, 1.0])", "list of different numbers"),
        ("ipm(epsilon=[1e39, 1])", "must fit float32"),
        ("ipm(epsilon=1e-50)", "must fit float32"),
        ("dba(parts=5)", "dba with"),
    ],
)
def test_bad_attacks(text, message):
    with pytest.raises(ValueError, match=message):
        specs.make_attack(text, 10)


def test_attacks():
    assert specs.make_attack("none", 10) == (None, None, ())
    both = specs.make_attack("label_flip(fraction=0.5)+ipm(epsilon=[1, 2])", 3)
    assert both.on_data.name == "label_flip"
    both.on_data.validate(3)
    assert float(both.on_updates.init(jnp.zeros(1), 1)) == 1.0
    assert both.strengths == (1.0, 2.0)


def test_partitions():
    assert specs.make_partition("label_bias(q=0.5)")
    with pytest.raises(ValueError, match="one step only"):
        specs.make_partition("iid+iid")
    with pytest.raises(ValueError, match="Did you mean 'dirichlet'"):
        specs.make_partition("diriclet(alpha=1)")


def test_own_functions(mine):
    rule = specs.make_aggregator("mine_for_specs.strict(share=0.9)", 1)
    assert rule.name == "trimmed_mean"
    rule.validate(5)
    with pytest.raises(ValueError, match="trimmed_mean"):
        rule.validate(4)  # f = 1 + 1
    attack = specs.make_attack("mine_for_specs.flip(scale=[1, 2])", 10)
    assert attack.strengths == (1.0, 2.0)
    with pytest.raises(TypeError, match="must return an Aggregator; got int"):
        specs.make_aggregator("mine_for_specs.wrong", 1)
    with pytest.raises(TypeError, match="must return an UpdateAttack or DataAttack"):
        specs.make_attack("mine_for_specs.wrong", 10)


def test_source_of_own_functions_counts(mine):
    assert specs.source_hash("nnm+krum") == specs.source_hash("none") == ""
    before = specs.source_hash("mine_for_specs.strict")
    mine.write_text(MINE + "\n")
    assert len(before) == 8
    assert specs.source_hash("mine_for_specs.strict") != before


def test_source_that_own_functions_come_from_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "package_for_specs"
    package.mkdir()
    (package / "__init__.py").write_text("from .rules import strict\n")
    (package / "rules.py").write_text(MINE)
    (tmp_path / "helped_for_specs.py").write_text(
        "import fedjax_sim\nfrom helper_for_specs import SHARE\n"
        "import helper_for_specs\n\ndef rule(): pass\n"
    )
    (tmp_path / "helper_for_specs.py").write_text("SHARE = 1\n")
    for name, file in (
        ("package_for_specs.strict", package / "rules.py"),
        ("helped_for_specs.rule", tmp_path / "helper_for_specs.py"),
    ):
        before = specs.source_hash(name)
        assert specs.source_hash(name) == before
        file.write_text(file.read_text() + "\n# changed\n")
        assert specs.source_hash(name) != before


def test_what_an_own_module_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacking_for_specs.py").write_text("import not_installed_here\n")
    with pytest.raises(ValueError, match="lacking_for_specs imports 'not_installed_h"):
        specs.make_aggregator("lacking_for_specs.rule", 1)
    (tmp_path / "broken_for_specs.py").write_text("import jax\njax.nothing_here\n")
    with pytest.raises(AttributeError, match="nothing_here"):
        specs.make_aggregator("broken_for_specs.rule", 1)
