"""What the engine knows of a model, and how a user's flax module becomes one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fedjax_sim.models.layers import to_float
from fedjax_sim.registry import lookup
from fedjax_sim.types import Array, Params

_WHY = (
    "clients train on parameters only, and every update is one vector of parameters: "
)
_NO_BATCH_NORM = (
    "{where} holds BatchNorm, which is refused: " + _WHY + "running statistics are "
    "not parameters and would dominate the cosine rules. Use GroupNorm or LayerNorm."
)
_NO_DROPOUT = (
    "{where} holds Dropout, which is refused: " + _WHY + "a forward pass has no random "
    "key of its own. Remove the layer."
)


def softmax_cross_entropy(outputs: Array, targets: Array) -> Array:
    """``-log softmax(outputs)[target]`` per example: ``[b, L], int [b] -> [b]``."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def sigmoid_cross_entropy(outputs: Array, targets: Array) -> Array:
    """Mean over the labels of the binary cross-entropy, per example.

    ``-1/L sum_l t_l log sigmoid(o_l) + (1 - t_l) log(1 - sigmoid(o_l))``

    Args:
        outputs: logits, ``float32 [b, L]``.
        targets: ``[b, L]``, 1 where the example has the label and 0 elsewhere.

    Returns:
        ``float32 [b]``.

    Example:
        >>> sigmoid_cross_entropy(jnp.zeros((2, 3)), jnp.eye(2, 3)).round(4).tolist()
        [0.6930999755859375, 0.6930999755859375]
    """
    return optax.sigmoid_binary_cross_entropy(outputs, targets).mean(axis=-1)


class Model(NamedTuple):
    """A model as three pure functions over a parameter pytree.

    Attributes:
        init: ``(key) -> params``.
        apply: ``(params, inputs [b, ...]) -> outputs [b, L]``; ``uint8`` images arrive
            as they are stored.
        loss: ``(outputs [b, L], targets [b]) -> [b]``, per example; ``targets [b, L]``
            where the task is multilabel.
        features: ``(params, inputs [b, ...]) -> [b, h]``, what the first block of the
            model makes of them, flattened, for client defenses that look at shallow
            features; None where the model has none.

    Example:
        >>> from fedjax_sim.models import mlp
        >>> model = mlp(input_shape=(8, 8, 1), num_classes=10)
        >>> params = model.init(jax.random.key(0))
        >>> model.apply(params, jnp.zeros((5, 8, 8, 1), jnp.uint8)).shape
        (5, 10)
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, Array], Array]
    loss: Callable[[Array, Array], Array] = softmax_cross_entropy
    features: Callable[[Params, Array], Array] | None = None

    @staticmethod
    def from_linen(
        module: nn.Module,
        input_shape: tuple[int, ...],
        loss: Callable[[Array, Array], Array] = softmax_cross_entropy,
        features: str | None = None,
    ) -> "Model":
        """A ``flax.linen`` module whose call takes a float batch and nothing else.

        Args:
            module: the module; ``uint8`` inputs reach it as float32 in [0, 1].
            input_shape: shape of one input, without the batch axis.
            loss: per-example loss.
            features: name of the submodule whose output is ``Model.features``, such as
                ``"Conv_0"``, or ``"head/Dense_0"`` for one within another; where it is
                called more than once, its first output counts. Under jit, what comes
                after it is not computed.

        Raises:
            ValueError: the module holds BatchNorm, Dropout, or any variable collection
                besides ``params``; or none of its submodules has the name ``features``.

        Example:
            >>> import flax.linen as nn
            >>> model = Model.from_linen(nn.Dense(3), input_shape=(4,))
            >>> model.init(jax.random.key(0))["kernel"].shape
            (4, 3)
        """
        where = f"linen module {type(module).__name__}"
        submodules: dict[str, tuple[str, ...]] = {}

        def inspect(next_call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.BatchNorm):
                raise ValueError(_NO_BATCH_NORM.format(where=where))
            if isinstance(context.module, nn.Dropout):
                raise ValueError(_NO_DROPOUT.format(where=where))
            path = context.module.path
            if path and context.method_name == "__call__":
                submodules["/".join(path)] = path
            return next_call(*args, **kwargs)

        def variables(key: Array) -> Mapping[str, Any]:
            return module.init(key, jnp.zeros((1, *input_shape), jnp.float32))

        with nn.intercept_methods(inspect):
            collections = set(jax.eval_shape(variables, jax.random.key(0)))
        if collections != {"params"}:
            raise ValueError(
                f"{where} has the variable collections {sorted(collections)}; expected "
                f"only 'params': {_WHY}anything else would be lost between rounds."
            )

        def apply(params: Params, inputs: Array) -> Array:
            outputs: Any = module.apply({"params": params}, to_float(inputs))
            return outputs

        def init(key: Array) -> Params:
            return variables(key)["params"]

        if features is None:
            return Model(init, apply, loss)
        wanted = lookup(f"submodule of {where}", features, submodules)

        def shallow(params: Params, inputs: Array) -> Array:
            _, captured = module.apply(
                {"params": params},
                to_float(inputs),
                capture_intermediates=lambda part, method: (
                    part.path == wanted and method == "__call__"
                ),
            )
            found: Any = captured["intermediates"]
            for name in wanted:
                found = found[name]
            return _flat(found["__call__"][0])

        return Model(init, apply, loss, shallow)

    @staticmethod
    def from_nnx(
        build: Callable[[nnx.Rngs], nnx.Module],
        loss: Callable[[Array, Array], Array] = softmax_cross_entropy,
        features: Callable[[Any, Array], Array] | None = None,
    ) -> "Model":
        """A ``flax.nnx`` module, given by the function that builds it from ``Rngs``.

        Args:
            build: such as ``lambda rngs: nnx.Linear(4, 3, rngs=rngs)``; its call takes
                a float batch (``uint8`` inputs reach it as float32 in [0, 1]).
            loss: per-example loss.
            features: ``(module, float inputs [b, ...]) -> [b, ...]``, flattened to make
                ``Model.features``, such as ``lambda net, x: nnx.relu(net.first(x))``.

        Raises:
            ValueError: the module holds BatchNorm, Dropout, or any state besides
                ``nnx.Param``.

        Example:
            >>> model = Model.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
            >>> model.init(jax.random.key(0))["kernel"].shape
            (4, 3)
        """
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        where = f"nnx module {type(module).__name__}"
        for _, part in nnx.iter_modules(module):
            if isinstance(part, nnx.BatchNorm):
                raise ValueError(_NO_BATCH_NORM.format(where=where))
            if isinstance(part, nnx.Dropout):
                raise ValueError(_NO_DROPOUT.format(where=where))
        graph, *states = nnx.split(module, nnx.Param, ...)
        shapes, rest = states
        if jax.tree.leaves(rest):
            kinds = sorted({type(v).__name__ for _, v in nnx.to_flat_state(rest)})
            raise ValueError(
                f"{where} holds state besides nnx.Param ({', '.join(kinds)}): "
                f"{_WHY}anything else would be lost between rounds."
            )

        def init(key: Array) -> Params:
            return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

        def with_params(params: Params) -> Any:
            state = nnx.State(shapes)
            nnx.replace_by_pure_dict(state, params)
            return nnx.merge(graph, state)

        def apply(params: Params, inputs: Array) -> Array:
            return with_params(params)(to_float(inputs))

        if features is None:
            return Model(init, apply, loss)

        def shallow(params: Params, inputs: Array) -> Array:
            return _flat(features(with_params(params), to_float(inputs)))

        return Model(init, apply, loss, shallow)


_LOSSES = {
    "classification": softmax_cross_entropy,
    "multilabel": sigmoid_cross_entropy,
}


def for_task(model: Model, task: str) -> Model:
    """The same model with the loss of a task, as ``Dataset.task`` names it.

    Args:
        model: the model; its own loss is replaced.
        task: ``classification`` (softmax cross-entropy, integer targets ``[b]``) or
            ``multilabel`` (sigmoid cross-entropy, targets ``[b, L]``).

    Raises:
        ValueError: another task.

    Example:
        >>> from fedjax_sim.models import mlp
        >>> model = for_task(mlp((4,), num_classes=14), "multilabel")
        >>> model.loss(jnp.zeros((5, 14)), jnp.zeros((5, 14))).shape
        (5,)
    """
    return model._replace(loss=lookup("task", task, _LOSSES))


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)
