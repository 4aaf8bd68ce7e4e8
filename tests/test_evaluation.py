"""Scores on the test set and on the clients' own samples, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim import evaluation
from fedjax_sim.types import Clients, Dataset, Examples

N, K, L, ATTACKERS = 6, 4, 3, 2
SIZES = (9, 12, 7, 10, 12, 8)
SEEDS = (0, 1)
LOCAL = {"loss", "accuracy", "own_loss", "own_accuracy"}
SCORES = ("accuracy", "auc", "balanced_accuracy", "class_recall", "class_specificity")


def examples(count, seed, task):
    """Images of which some pixels show the class, or each of the labels."""
    rng = np.random.default_rng(seed)
    multilabel = task == "multilabel"
    shape = (count, L) if multilabel else (count,)
    targets = rng.integers(0, 2 if multilabel else L, shape).astype(np.int32)
    inputs = rng.normal(size=(count, 4, 4, 1)).astype(np.float32)
    inputs[:, 0, :L, 0] += 2 * (targets if multilabel else np.eye(L)[targets])
    if multilabel:
        inputs = np.clip(128 + 60 * inputs, 0, 255).astype(np.uint8)
    return Examples(inputs, targets)


def divided(task):
    """The clients, each with what it holds out: of different sizes, or by federate."""
    if task == "multilabel":
        train, test = (examples(count, 1, task) for count in (120, 40))
        data = Dataset("tiny", train, test, ("a", "b", "c"), "", "", task)
        clients, _ = fs.data.federate(data, N, fs.data.iid(), root_size=0)
    else:
        ends = np.cumsum(SIZES)
        rows = [np.arange(end - size, end) for size, end in zip(SIZES, ends)]
        clients = fs.data.clients_from_indices(examples(ends[-1], 1, task), rows)
    return fs.data.hold_out(clients, 0.4)


def shared(task):
    model = fs.models.mlp((4, 4, 1), num_classes=L, hidden=())
    clients, held_out = divided(task)
    rate = 2.0 if task == "multilabel" else 0.4  # of bytes, which a model divides
    return {
        "model": fs.models.for_task(model, task),
        "clients": clients,
        "local_test": held_out,
        "test": examples(40, 2, task),
        "client_update": fs.local_sgd(optax.sgd(rate), steps=20, batch_size=4),
        "aggregator": fs.aggregators.fedavg(),
        "cohort_size": K,
    }


SHARED = {task: shared(task) for task in ("classification", "multilabel")}
TARGETED = {"mode": "targeted", "source": 0, "target": 2}
# All samples of an attacker, of those that the attack is about.
ATTACKS = {
    "classification": {"clean": None, "flip": fs.attacks.label_flip(L)},
    "multilabel": {
        "flip": fs.attacks.label_flip(L, **TARGETED),
        "stamp": fs.attacks.badnets(L, target=1, size=2, fraction=1.0),
    },
}


def simulate(task="classification", **options):
    return fs.Simulation(**{**SHARED[task], **options})


@pytest.fixture(scope="module", params=list(SHARED))
def played(request):
    """The systems, and of each two rounds, evaluated at the end, states and history."""
    systems = {
        name: simulate(
            request.param, data_attack=attack, num_byzantine=ATTACKERS if attack else 0
        )
        for name, attack in ATTACKS[request.param].items()
    }
    both, found = fs.compare(systems), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "EVALUATION_BATCH", 7)  # of 40 samples
        states = both.init(jnp.stack([jax.random.key(seed) for seed in SEEDS]))
        for _ in range(2):
            states, histories = both.run(states=states, num_rounds=2, eval_every=2)
            found.append((jax.device_get(states), histories))
    return systems, found


def each(played):
    """Every system, seed and two rounds: the simulation, and what came of it."""
    systems, found = played
    for name, sim in systems.items():
        for states, histories in found:
            for s in range(len(SEEDS)):
                both = states[name], histories[name]
                yield name, sim, *jax.tree.map(lambda x, s=s: x[s], both)


def outputs_of(params, inputs):
    """Logits of softmax regression, without the package."""
    x = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
    x = x / 255 if inputs.dtype == np.uint8 else x
    layer = params["Dense_0"]
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])


def loss_of(outputs, target):
    """Cross-entropy of one sample, with its class or with 0 and 1 for each label."""
    if np.ndim(target) == 0:
        return -outputs[target] + np.log(np.sum(np.exp(outputs)))
    odds = [o if t else -o for o, t in zip(outputs, target)]
    return np.mean([np.log(1 + np.exp(-o)) for o in odds])


def right(outputs, target):
    if np.ndim(target) == 0:
        return float(np.argmax(outputs) == target)
    return np.mean([(o > 0) == bool(t) for o, t in zip(outputs, target)])


def poison(name, x, y):
    """One sample as an attacker has it."""
    x, y = np.array(x), np.array(y)
    if name == "stamp":
        x[2:, 2:] = 255
        y = np.array([0, 1, 0])
    if name == "flip" and y.ndim == 0:
        y = L - 1 - y
    elif name == "flip" and y[0] == 1:
        y[0], y[2] = 0, 1
    return x, y


def test_clients_are_evaluated_on_their_own_samples(played):
    absent = 0
    for name, sim, state, history in each(played):
        own = jax.device_get(sim.local_test)
        assert set(history.local) == LOCAL
        for values in history.local.values():
            assert values.shape == (2, K)
            assert np.isnan(values[0]).all()  # not evaluated
        for place, client in enumerate(history.client_ids[1]):
            losses, correct = [], []
            for row, there in zip(own.indices[client], own.mask[client]):
                if there:
                    x, y = own.inputs[row], own.targets[row]
                    if state.byzantine[client]:
                        x, y = poison(name, x, y)
                    (outputs,) = outputs_of(state.params, x[None])
                    losses.append(loss_of(outputs, y))
                    correct.append(right(outputs, y))
            total = len(losses) + sim.clients.mask[client].sum()
            assert len(losses) == round(0.4 * int(total))
            found = {field: v[1, place] for field, v in history.local.items()}
            np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-4)
            np.testing.assert_allclose(found["accuracy"], np.mean(correct), rtol=1e-5)
        absent += state.byzantine.sum() - history.byzantine[1].sum()
    assert absent > 0


def test_scores_are_the_metrics_of_the_whole_test_set(played):
    @jax.jit
    def measure(params, test):
        outputs = sim.model.apply(params, test.inputs)
        own = {name: getattr(fs.metrics, name) for name in SCORES}
        return {name: score(outputs, test.targets) for name, score in own.items()}

    for _, sim, state, history in each(played):
        for field, expected in measure(state.params, sim.test).items():
            found = getattr(history, field)
            np.testing.assert_allclose(found[1], expected, rtol=1e-6)
            assert np.isnan(found[0]).all()
        outputs = outputs_of(state.params, sim.test.inputs)
        losses = [loss_of(o, y) for o, y in zip(outputs, sim.test.targets)]
        np.testing.assert_allclose(history.loss[1], np.mean(losses), rtol=1e-5)
        assert np.isnan(history.loss[0])
        assert history.auc[1] > 0.75  # something was learnt


def test_attack_success_equals_a_loop(played):
    for name, sim, state, history in each(played):
        hits = []
        multilabel = np.ndim(sim.test.targets) == 2
        for x, y in zip(sim.test.inputs, sim.test.targets):
            if name == "stamp":
                wanted, counts, (x, _) = 1, y[1] == 0, poison(name, x, y)
            else:
                counts = name == "flip" and multilabel and y[0] == 1 and y[2] == 0
                wanted = 2
            (outputs,) = outputs_of(state.params, x[None])
            if counts:
                said = outputs[wanted] > 0 if multilabel else np.argmax(outputs)
                hits.append(said if multilabel else said == wanted)
        expected = np.mean(hits) if hits else np.nan
        np.testing.assert_allclose(history.attack_success[1], expected, rtol=1e-6)
        assert np.isnan(history.attack_success[0])


def test_what_is_not_there_is_not_evaluated():
    def shapes(**options):
        alone = simulate(**options).alone
        _, histories = alone.shapes(jax.eval_shape(alone.init, jax.random.key(0)), 3, 1)
        (history,) = histories.values()
        return history

    assert shapes(local_test=None).local == {}
    without = shapes(test=None)
    assert {k: v.shape for k, v in without.local.items()} == dict.fromkeys(
        LOCAL, (3, K)
    )


def keeping():
    """A rule that keeps what clients sent, and leaves the model as it is."""

    def init(params, num_clients):
        return jax.tree.map(lambda w: jnp.zeros((K, *w.shape), w.dtype), params)

    def apply(updates, state, context):
        info = fs.types.AggregatorInfo(
            jnp.ones(K) / K, jnp.zeros(K, bool), jnp.zeros(K)
        )
        return jax.tree.map(lambda u: 0.0 * u[0], updates), updates, info

    return fs.types.Aggregator(init, apply, lambda size: None, name="keeping")


@pytest.mark.parametrize("attack", [None, fs.attacks.sign_flip(scale=9.0)])
def test_a_client_s_own_model_is_the_one_it_trained(attack):
    options = {"attack": attack, "num_byzantine": ATTACKERS} if attack else {}
    sim = simulate(aggregator=keeping(), **options)
    start = jax.device_get(sim.init(jax.random.key(3)))
    state, history = sim.run(jax.random.key(3), num_rounds=1)
    state, own = jax.device_get(state), jax.device_get(sim.local_test)
    for place, client in enumerate(history.client_ids[0]):
        sent = jax.tree.map(lambda u, p=place: u[p], state.aggregator)
        if attack and state.byzantine[client]:
            sent = jax.tree.map(lambda u: u / -9.0, sent)  # what it did not send
        model = jax.tree.map(lambda w, u: w + u, start.params, sent)
        rows = own.indices[client][own.mask[client]]
        outputs = outputs_of(model, own.inputs[rows])
        losses = [loss_of(o, own.targets[r]) for o, r in zip(outputs, rows)]
        hits = [right(o, own.targets[r]) for o, r in zip(outputs, rows)]
        found = {field: values[0, place] for field, values in history.local.items()}
        np.testing.assert_allclose(found["own_loss"], np.mean(losses), rtol=1e-4)
        np.testing.assert_allclose(found["own_accuracy"], np.mean(hits), rtol=1e-5)
        assert found["own_loss"] < found["loss"]  # of the server's, which stays


# What is refused

LOCAL_TEST = SHARED["classification"]["local_test"]


def emptied(clients, client):
    return clients._replace(mask=clients.mask.at[client].set(False))


def overlapping():
    """Client 3 of the run, which holds out the second sample it trains on."""
    row = SHARED["classification"]["clients"].indices[3, 1]
    return LOCAL_TEST._replace(indices=LOCAL_TEST.indices.at[3, 0].set(row)), int(row)


def test_local_test_of_other_clients():
    fewer = Clients(*LOCAL_TEST[:2], *(x[:5] for x in LOCAL_TEST[2:]))
    message = "must have the clients of the run, 6; got 5. Take both from fs.data.hold"
    with pytest.raises(ValueError, match=message):
        simulate(local_test=fewer)
    with pytest.raises(TypeError, match="local_test must be of type Clients"):
        simulate(local_test=SHARED["classification"]["test"])


def test_local_test_beyond_its_pool():
    indices = np.array(LOCAL_TEST.indices)
    for row in (-1, len(LOCAL_TEST.targets)):
        indices[0, 0] = row
        with pytest.raises(
            ValueError, match=rf"indices from .*{row}.* but its pool has"
        ):
            simulate(local_test=LOCAL_TEST._replace(indices=jnp.asarray(indices)))


def test_local_test_without_samples_of_somebody():
    held_out = emptied(emptied(LOCAL_TEST, 4), 2)
    message = "no samples for 2 clients, the first of them client 2. Hold out a larger"
    with pytest.raises(ValueError, match=message):
        simulate(local_test=held_out)


def test_local_test_of_samples_that_are_trained_on():
    held_out, row = overlapping()
    message = f"1 samples of local_test are also .* is row {row} of client 3. Pass the"
    with pytest.raises(ValueError, match=message):
        simulate(local_test=held_out)
    # Another client may train on them.
    shifted = held_out._replace(
        indices=jnp.roll(LOCAL_TEST.indices, 1, axis=0),
        mask=jnp.roll(LOCAL_TEST.mask, 1, axis=0),
    )
    simulate(local_test=shifted)
    # The same rows of another pool are other samples.
    simulate(local_test=held_out._replace(inputs=jnp.copy(held_out.inputs)))


def test_the_loss_of_another_task():
    model = SHARED["classification"]["model"]
    message = r"here \(2,\), .* targets \(2, 3\); got .* fs.models.for_task\(model, 'mu"
    with pytest.raises(ValueError, match=message):
        simulate("multilabel", model=model)
    scalar = model._replace(loss=lambda outputs, targets: jnp.mean(outputs))
    with pytest.raises(ValueError, match=r"one number a sample, .* got \(\)\. For"):
        simulate(model=scalar)


@pytest.mark.parametrize("name", ["clients", "test", "local_test", "root"])
def test_labels_that_are_not_0_and_1(name):
    data = SHARED["multilabel"].get(name, examples(9, 3, "multilabel"))

    def refused(targets, message):
        with pytest.raises(ValueError, match=rf"{name} has targets .*{message}"):
            simulate("multilabel", **{name: data._replace(targets=targets)})

    y = data.targets
    refused(y + 1, r"shape \(\d+, 3\) .* int32: .* must be integers 0 and 1, one ")
    refused(1.0 * y, "type float")
    refused(y[:, :2], r"shape \(\d+, 2\) .* the model's 3 outputs")


def test_tasks_are_not_mixed():
    for name, other in (("test", "test"), ("root", "test"), ("local_test", "clients")):
        message = f"{name} must have targets of as many dimensions"
        with pytest.raises(ValueError, match=message):
            simulate("multilabel", **{name: SHARED["classification"][other]})
