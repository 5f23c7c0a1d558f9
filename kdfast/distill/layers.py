"""What a student learns from inside its teacher: hidden states and attention, layer by layer.

With k = teacher's layers / student's layers, hidden state i of the student (0: the embeddings)
learns from the teacher's i * k, and the attention of layer i from that of layer (i + 1) * k - 1:
TinyBERT's stage (Jiao et al. 2020, arxiv.org/abs/1909.10351) with the map of Haystack 1.x. The
teacher runs beside the student: kept on a disk, the hidden states of a token would take some
thousand bytes, and half of the student's own work suffices to compute them.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from kdfast.distill import models, teacher
from kdfast.distill.config import TrainConfig
from kdfast.distill.feed import MicroBatch
from kdfast.distill.models import SpanModel
from kdfast.distill.precision import AUTOCAST
from kdfast.distill.step import Stepper
from kdfast.errors import UserError
from kdfast.squad import features

# What of each layer the terms read, by the names that transformers gives these linear layers.
NEEDS = {"none": (), "probabilities": ("query", "key"), "relations": ("query", "key", "value")}


class LayerStepper(Stepper):
    """Steps that learn from the teacher's layers. forward: LayerTerms."""

    PARTS = ("hidden", "attention")

    def losses(self, terms: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B,) and their parts (B, 2); terms: (B, 2)."""
        return terms.sum(1), terms


class LayerTerms(nn.Module):
    """A student and its teacher, side by side; forward() gives how far they are apart.

    attention: "none"; "probabilities", before dropout, of every layer; or "relations" among the
    queries, keys and values of the last one (MiniLMv2). What is compared is fp32, or fp64 for fp64
    models. Where the student is less wide than the teacher, `projection` (layers + 1, width,
    teacher's width), drawn from `seed`, bridges the two and trains with the student.

    The teacher and the student's span head are frozen. Raises UserError where layers or heads
    cannot be mapped.
    """

    def __init__(self, student: SpanModel, teacher: SpanModel, attention: str, seed: int):
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        student.reader.qa_outputs.requires_grad_(False)
        own, taught = student.reader.config, teacher.reader.config
        self.every = layers_apart(own.num_hidden_layers, taught.num_hidden_layers)
        self.attention = attention
        layers = list(range(own.num_hidden_layers))
        if attention == "relations":
            layers = layers[-1:]
        self.own = Heard(student, attention, "student", layers)
        self.taught = Heard(
            teacher, attention, "teacher", [(layer + 1) * self.every - 1 for layer in layers]
        )
        self.heads = own.num_attention_heads
        if attention == "relations":
            self.heads = math.gcd(own.num_attention_heads, taught.num_attention_heads)
        elif attention == "probabilities" and self.heads != taught.num_attention_heads:
            raise UserError(
                f"--attention_loss probabilities: the student has {self.heads} attention heads and "
                f"--teacher has {taught.num_attention_heads}: give relations, which need no equal "
                "number, or none."
            )
        self.projection = None
        if own.hidden_size != taught.hidden_size:
            shape = (own.num_hidden_layers + 1, own.hidden_size, taught.hidden_size)
            draw = torch.Generator().manual_seed(seed)
            self.projection = nn.Parameter(
                torch.randn(shape, generator=draw) / math.sqrt(own.hidden_size)
            )

    def train(self, mode: bool = True) -> "LayerTerms":
        """As every module's, but the teacher never has dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, 2): of each window the hidden states' term and the attention's, 0 without one.

        Arguments as SpanModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids)
        with torch.no_grad():
            targets = self.teacher.hidden_states(*inputs)[:: self.every]
        states = self.student.hidden_states(*inputs)
        mask = attention_mask
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        with torch.autocast(input_ids.device.type, enabled=False):
            hidden = hidden_term(states, targets, mask, self.projection)
            attention = torch.zeros_like(hidden)
            pairs = zip(self.own.take(self.heads), self.taught.take(self.heads), strict=True)
            for own, taught in pairs:
                if self.attention == "probabilities":
                    attention = attention + AttentionTerm.apply(*own, *taught, mask)
                else:
                    for each in zip(own, taught, strict=True):
                        attention = attention + RelationTerm.apply(*each, mask)
            return torch.stack([hidden, attention], dim=1)


class Heard:
    """The queries, keys and values, as far as `attention` needs them, of some layers of a model.

    role: what to call the model in a message. Raises UserError for a model without such layers.
    """

    def __init__(self, model: SpanModel, attention: str, role: str, layers: list[int]):
        self.names = NEEDS[attention]
        self.layers = layers if self.names else []
        self._outputs: dict[tuple[int, str], torch.Tensor] = {}
        modules = attention_modules(model.reader)
        if self.layers and modules is None:
            raise UserError(
                f"--attention_loss {attention}: the attention of {model.reader.config.model_type}, "
                f"the type of the {role}, is not a plain softmax of queries and keys in layers of "
                "their own: give none."
            )
        for layer in self.layers:
            for name in self.names:
                getattr(modules[layer], name).register_forward_hook(self._listener(layer, name))

    def _listener(self, layer: int, name: str) -> Callable:
        def listen(module, inputs, output):
            self._outputs[layer, name] = output

        return listen

    def take(self, heads: int) -> Iterator[list[torch.Tensor]]:
        """Layer by layer what the model's last run gave: (B, heads, L, width of a head) for each
        name. It is held no longer."""
        for layer in self.layers:
            found = [self._outputs.pop((layer, name)) for name in self.names]
            yield [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in found]


def attention_modules(reader: nn.Module) -> list[nn.Module] | None:
    """The self-attention of every layer, where it is a softmax of linear queries and keys alone;
    None where it is not, or is one for all layers."""
    found = [
        module
        for module in reader.base_model.modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in NEEDS["relations"])
    ]
    return found if len(found) == reader.config.num_hidden_layers else None


def layers_apart(layers: int, teacher_layers: int) -> int:
    """How many layers of the teacher stand for one of the student. Raises UserError for a part."""
    if teacher_layers % layers:
        raise UserError(
            f"--stage layers: the teacher's {teacher_layers} layers are no multiple of the "
            f"student's {layers}: give a --student, or --student_layers, whose number divides it."
        )
    return teacher_layers // layers


def hidden_term(
    states: tuple[torch.Tensor, ...],
    targets: tuple[torch.Tensor, ...],
    mask: torch.Tensor,
    projection: torch.Tensor | None,
) -> torch.Tensor:
    """(B,): the mean of (state - target)^2 over real positions and units, summed over the layers.

    states, targets: as many (B, L, width), the widths of the two equal unless there is a
    projection. mask: bool (B, L), True for real positions.
    """
    found, wanted = widened(torch.stack(states)), widened(torch.stack(targets))  # (n, B, L, width)
    if projection is None:
        difference = found - wanted
    else:
        flat = torch.baddbmm(wanted.flatten(1, 2), found.flatten(1, 2), projection, beta=-1)
        difference = flat.view_as(wanted)
    squares = difference.square().mean(-1).sum(0)
    return torch.where(mask, squares, 0).sum(1) / mask.sum(1)


class AttentionTerm(torch.autograd.Function):
    """(B,): the mean of (softmax(query key^T / sqrt(D)) - the teacher's)^2 over heads and pairs of
    real positions.

    query, key: (B, H, L, D); teacher_query, teacher_key: (B, H, L, D'). mask: bool (B, L). The
    gradient of each window's term is made at once and kept in fp32, so that nothing of the size of
    attention outlives forward(); backward() scales it.
    """

    @staticmethod
    def forward(ctx, query, key, teacher_query, teacher_key, mask):
        ctx.dtype = query.dtype
        query, key = widened(query), widened(key)
        probabilities = scores(query, key, mask).softmax(-1)
        difference = scores(widened(teacher_query), widened(teacher_key), mask).softmax(-1)
        torch.sub(probabilities, difference, out=difference)
        difference.mul_(mask[:, None, :, None])
        weight = 1 / (query.shape[1] * mask.sum(1).to(query.dtype) ** 2)
        term = difference.square().sum(dim=(1, 2, 3)) * weight
        difference.mul_(2 * weight[:, None, None, None])
        of_scores = torch._softmax_backward_data(difference, probabilities, -1, query.dtype)
        of_scores.mul_(query.shape[-1] ** -0.5)
        ctx.save_for_backward(of_scores @ key, of_scores.mT @ query)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = [(grad[:, None, None, None] * each).to(ctx.dtype) for each in ctx.saved_tensors]
        return *grads, None, None, None


class RelationTerm(torch.autograd.Function):
    """(B,): KL(teacher || student) of the relations softmax(x x^T / sqrt(D)), the mean over heads
    and real positions: MiniLMv2's (Wang et al. 2021, arxiv.org/abs/2012.15828, equation 4).

    values: (B, H, L, D). teacher_values: (B, H, L, D'). mask: bool (B, L). Gradients as in
    AttentionTerm.
    """

    @staticmethod
    def forward(ctx, values, teacher_values, mask):
        ctx.dtype = values.dtype
        values, teacher_values = widened(values), widened(teacher_values)
        found = scores(values, values, mask).log_softmax(-1)
        wanted = scores(teacher_values, teacher_values, mask).log_softmax(-1)
        weight = mask / (values.shape[1] * mask.sum(1, keepdim=True)).to(values.dtype)
        difference = (wanted - found).masked_fill_(~mask[:, None, None], 0)  # not inf - inf
        probabilities = wanted.exp()
        term = ((difference.mul_(probabilities)).sum(-1).sum(1) * weight).sum(1)
        of_scores = found.exp_().sub_(probabilities).mul_(weight[:, None, :, None])
        of_scores.mul_(values.shape[-1] ** -0.5)
        ctx.save_for_backward((of_scores + of_scores.mT) @ values)
        return term

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        return (grad[:, None, None, None] * saved).to(ctx.dtype), None, None


def scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, H, L, L): query key^T / sqrt(D), -inf for keys that are padding."""
    found = query @ key.mT
    found.mul_(query.shape[-1] ** -0.5)
    return found.masked_fill_(~mask[:, None, None], -torch.inf)


def widened(values: torch.Tensor) -> torch.Tensor:
    """fp32 for half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def find_teacher(config: TrainConfig, student: models.Loaded) -> str:
    """weights_key of the teacher. Raises UserError for one whose tokens are not the student's."""
    name = config.teacher[0]
    folder = models.local_folder(name, "--teacher")
    key = features.tokenizer_key(models.load_tokenizer(folder, "--teacher"))
    if key != features.tokenizer_key(student.tokenizer):
        raise UserError(
            f"--stage layers: --teacher {name} has another tokenizer than the student, and hidden "
            "states are compared token by token: give a teacher with the student's tokenizer, or "
            "--stage predictions."
        )
    return teacher.weights_key(folder)


def learner(
    config: TrainConfig, student: SpanModel, device: torch.device, precision: str
) -> tuple[nn.Module, type[Stepper]]:
    """What trains in the stage of a run, and the kind of its steps.

    In stage layers the teacher is loaded. Its span head is not used: it may have none.
    """
    if config.stage != "layers":
        return student, Stepper
    name = config.teacher[0]
    loaded = models.load_reader(name, "--teacher", new_head_seed=config.seed)
    models.check_fits(loaded, config.max_seq_length, name)
    terms = LayerTerms(student, loaded.model, config.attention_loss, config.seed).to(device)
    if precision != "no":
        terms.teacher.round_products(AUTOCAST[precision])
    return terms, LayerStepper
