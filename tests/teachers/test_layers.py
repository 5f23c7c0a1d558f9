import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from kdfast.common.errors import UserError
from kdfast.config import LossSettings
from kdfast.models import load
from kdfast.models.span_model import SpanModel
from kdfast.teachers import layer_losses, layers
from kdfast.train import train_loop
from kdfast.training import invariance
from kdfast.training.step import layer_objective, span_objective
from tests import published, readers, steppers

# Those whose layers attend with a softmax that a student can learn, and the rest.
PLAIN = sorted({*published.TYPES} - {"modernbert"})
LENGTHS = [11, 3, 7]


def pair(path, model_type="bert", *, teacher=None, **student):
    """A student of two layers and a teacher of four, loaded."""
    own = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    names = [
        readers.save(path / "student", model_type, seed=1, **own, **student),
        readers.save(path / "teacher", model_type, seed=2, layers=4, **(teacher or {})),
    ]
    return [load.load_reader(name, "--teacher").model for name in names]


def batch(model, seed=3):
    """Random windows of LENGTHS, padded, and their mask."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.reader.config.vocab_size, (len(LENGTHS), 11), generator=draw)
    mask = torch.arange(11) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask, ids, model.reader.config.pad_token_id), mask


def by_the_book(student, teacher, ids, attention, projection=None):
    """Both terms of one window without padding, from what transformers itself returns."""
    found, wanted = (
        each.reader.base_model(ids[None], output_hidden_states=True, output_attentions=True)
        for each in (student, teacher)
    )
    hidden = 0.0
    for i, state in enumerate(found.hidden_states):
        state = state if projection is None else state @ projection[i]
        hidden = hidden + functional.mse_loss(state, wanted.hidden_states[2 * i])
    weights = 0.0
    if attention == "probabilities":
        for i, each in enumerate(found.attentions):
            weights = weights + functional.mse_loss(each, wanted.attentions[2 * (i + 1) - 1])
    return torch.stack([hidden, torch.as_tensor(weights, dtype=hidden.dtype)])


def eager(model):
    model.reader.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("attention", ["none", "probabilities"])
@pytest.mark.parametrize("model_type", PLAIN)
def test_terms_are_those_of_each_window_alone(tmp_path, model_type, attention):
    student, teacher = (each.double() for each in pair(tmp_path, model_type))
    ids, mask = batch(student)
    terms = layers.LayerLosses(student, teacher, attention, 0)
    found = terms(ids, mask)
    eager(student), eager(teacher)
    for row, length in enumerate(LENGTHS):
        wanted = by_the_book(student, teacher, ids[row, :length], attention)
        torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-12)
    assert (found[:, 1] > 1e-4).all() == (attention == "probabilities")


@pytest.mark.parametrize("attention", ["none", "probabilities"])
@pytest.mark.parametrize("model_type", ["albert", "bert", "deberta-v2", "mpnet"])
def test_gradients_are_those_of_each_window_alone(tmp_path, model_type, attention):
    made = pair(tmp_path, model_type, teacher={"hidden_size": 24})
    student, teacher = (each.double() for each in made)
    ids, mask = batch(student)
    terms = layers.LayerLosses(student, teacher, attention, 0).double()
    wanted = [each for name, each in terms.named_parameters() if each.requires_grad]
    ours = torch.autograd.grad(terms(ids, mask).sum(), wanted)
    eager(student), eager(teacher)
    whole = sum(
        by_the_book(student, teacher, ids[row, :length], attention, terms.projection).sum()
        for row, length in enumerate(LENGTHS)
    )
    theirs = torch.autograd.grad(whole, wanted)
    assert any(each is terms.projection for each in wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


LINEAR = {
    "albert": ("query", "key", "value"),
    "bert": ("query", "key", "value"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mpnet": ("q", "k", "v"),
}


@pytest.mark.parametrize("model_type", LINEAR)
def test_relations_are_the_papers(tmp_path, model_type):
    """MiniLMv2, with 2 and 3 heads: one relation head, which both numbers have."""
    wider = {"hidden_size": 24, "num_attention_heads": 3}
    student, teacher = pair(tmp_path, model_type, teacher=wider)
    student, teacher = student.double(), teacher.double()
    terms = layers.LayerLosses(student, teacher, "relations", 0).double()
    ids, mask = batch(student)
    found = terms(ids, mask)[:, 1]
    assert terms.heads == 1
    for row, length in enumerate(LENGTHS):
        wanted = 0.0
        for name in LINEAR[model_type]:
            relations = []
            for model in (student, teacher):
                inputs = model.hidden_states(ids[row : row + 1, :length])[-2][0]
                named = model.reader.base_model.named_modules()
                *_, last = (each for path, each in named if path.endswith(f".{name}"))
                values = last(inputs)
                scores = values @ values.T / values.shape[-1] ** 0.5
                relations.append(scores.log_softmax(-1))
            own, taught = relations
            wanted += functional.kl_div(own, taught, log_target=True, reduction="batchmean")
        torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-12)


def random_heads(seed, *shape):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def test_gradients_against_differences():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    query, key = (random_heads(seed, 2, 3, 4, 5).requires_grad_() for seed in (1, 2))
    taught = [random_heads(seed, 2, 3, 4, 6) for seed in (3, 4)]
    attention, relation = layers.AttentionTerm.apply, layers.RelationTerm.apply
    bias, other = (random_heads(seed, 2, 3, 4, 4).requires_grad_() for seed in (5, 6))

    def term(query, key, bias=None):
        return attention(query, key, bias, 0.4, (*taught, other.detach(), 0.3), mask)

    assert torch.autograd.gradcheck(term, (query, key))
    assert torch.autograd.gradcheck(term, (query, key, bias))
    assert torch.autograd.gradcheck(lambda x: relation(x, taught[0], mask), (query,))


@pytest.mark.parametrize("attention", ["probabilities", "relations"])
def test_nothing_of_the_size_of_attention_is_kept(tmp_path, attention):
    student, teacher = pair(tmp_path)
    terms = layers.LayerLosses(student, teacher, attention, 0)
    ids = torch.randint(5, 20, (1, 300), generator=torch.Generator().manual_seed(0))
    sizes = []

    def seen(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        terms(ids)
    assert max(sizes) < 300 * 300


def test_dropout_is_the_students_alone_and_not_in_the_probabilities(tmp_path):
    dropped = {"attention_probs_dropout_prob": 0.5}
    name = readers.save(tmp_path / "student", seed=1, layers=1, hidden_dropout_prob=0.0, **dropped)
    taught = readers.save(tmp_path / "teacher", seed=2, hidden_dropout_prob=0.5, **dropped)
    student, teacher = (load.load_reader(each, "--teacher").model for each in (name, taught))
    terms = layers.LayerLosses(student, teacher, "probabilities", 0)
    ids, mask = batch(student)
    with torch.no_grad():
        quiet, trained = terms.eval()(ids, mask), terms.train()(ids, mask)
    assert student.training and not any(each.training for each in teacher.modules())
    torch.testing.assert_close(trained[:, 1], quiet[:, 1], rtol=1e-5, atol=0)
    assert not torch.allclose(trained[:, 0], quiet[:, 0])


@pytest.mark.parametrize("attention", ["none", "probabilities"])
def test_half_precision_errs_no_more_than_plain_attention(tmp_path, attention):
    student, teacher = pair(tmp_path)
    terms = layers.LayerLosses(student, teacher, attention, 0)
    batches = [batch(student, seed) for seed in range(8)]  # of one the errors are chance

    def book(ids):
        found = [
            by_the_book(student, teacher, ids[row, :length], attention)
            for row, length in enumerate(LENGTHS)
        ]
        return torch.stack(found).float()

    exact = torch.cat([terms.double()(ids, mask) for ids, mask in batches])
    terms.float()
    teacher.cast_linear_layers(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.cat([terms(ids, mask) for ids, mask in batches])
        eager(student), eager(teacher)
        theirs = (torch.cat([book(ids) for ids, _ in batches]) - exact).abs()
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() <= theirs.mean() + 1e-4 * exact.mean()
    rough.sum().backward()
    assert all(each.grad is not None for each in student.reader.base_model.parameters())


def test_fp16_keeps_the_gradients_of_attention():
    """Under the stage's own first scale, of what the usual one would make 0."""
    query, key, *taught = (random_heads(seed, 1, 12, 384, 32) for seed in range(4))
    mask = torch.ones(1, 384, dtype=torch.bool)

    def gradient(dtype, scale):
        halves = [each.to(dtype) for each in (query, key, *taught)]
        halves[0].requires_grad_()
        scaled = (None, 32**-0.5)
        term = layers.AttentionTerm.apply(*halves[:2], *scaled, (*halves[2:], *scaled), mask)
        (term.sum() / 96 * scale).backward()
        return halves[0].grad.double() / scale

    exact = gradient(torch.float32, 1.0)
    usual = gradient(torch.float16, span_objective(LossSettings()).initial_scale)
    own = gradient(torch.float16, layer_objective().initial_scale)
    assert (usual == 0).double().mean() > 0.1
    assert (own == 0).double().mean() < 0.05
    assert (own - exact).norm() < 0.5 * (usual - exact).norm()


def test_a_forward_pass_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    student, teacher = pair(tmp_path)
    terms = layers.LayerLosses(student, teacher, "probabilities", 0)
    ids, mask = batch(student)

    def full(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(layers, "hidden_term", full)
    with pytest.raises(torch.OutOfMemoryError):
        terms(ids, mask)
    student(ids, mask)  # nor does a pass outside of forward()
    assert not terms.own._outputs and not terms.taught._outputs


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("attention", ["none", "probabilities", "relations"])
def test_every_split_has_the_same_gradient(tmp_path, attention, width):
    teacher = readers.save(tmp_path / "taught", layers=4, seed=1, hidden_size=width)
    run = steppers.make(
        tmp_path, stage="layers", attention_loss=attention, dropout=0.3, teacher_name=teacher
    )
    splits = invariance.check(run.training, train_loop, np.arange(12))
    assert all(each.good for each in splits), invariance.table(splits)
    assert max(each.fp64 for each in splits) < 1e-12


def test_a_step_learns_and_reports_its_parts(tmp_path):
    teacher = readers.save(tmp_path / "taught", layers=4, seed=1, hidden_size=24)
    run = steppers.make(
        tmp_path, stage="layers", attention_loss="probabilities", teacher_name=teacher
    )
    before = run.training.forward.projection.detach().clone()
    head = run.model.reader.qa_outputs.weight.clone()
    reports = [run.step(step, np.arange(8)) for step in range(6)]
    assert reports[-1].loss < reports[1].loss
    for each in reports:
        assert each.loss == pytest.approx(sum(each.parts.values()), rel=1e-5)
        assert list(each.parts) == ["hidden", "attention"] and min(each.parts.values()) > 0
    assert not torch.equal(run.training.forward.projection, before)
    assert torch.equal(run.model.reader.qa_outputs.weight, head)


def refused(path, attention="none", model_type="bert", **changes):
    student, teacher = pair(path, model_type, **changes)
    with pytest.raises(UserError) as error:
        layers.LayerLosses(student, teacher, attention, 0)
    return str(error.value)


def test_what_does_not_map_is_refused(tmp_path):
    said = refused(tmp_path / "a", layers=3)
    assert "4 layers are no multiple of the student's 3" in said and "--student_layers" in said
    said = refused(tmp_path / "b", "probabilities", teacher={"num_attention_heads": 4})
    assert "has 2 attention heads and --teacher has 4" in said and "relations" in said


@pytest.mark.parametrize("model_type", sorted({*published.TYPES} - {*PLAIN}))
@pytest.mark.parametrize("attention", ["probabilities", "relations"])
def test_attention_of_another_kind_is_refused(tmp_path, model_type, attention):
    said = refused(tmp_path, attention, model_type)
    assert model_type in said and "do not come from three linear layers" in said
    assert "give none" in said


def test_probabilities_that_the_queries_do_not_tell_are_refused(tmp_path):
    """RoFormer turns queries and keys by their positions first."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RoFormerConfig(vocab_size=50, num_hidden_layers=2, **sizes)
    model = SpanModel(transformers.RoFormerForQuestionAnswering(config).eval())
    with pytest.raises(UserError, match=r"roformer.* is not a softmax of queries, keys and a bias"):
        layer_losses.AttentionCapture(model, "probabilities", "student", [0, 1])
    assert layer_losses.AttentionCapture(model, "relations", "student", [1]).layers == [1]


@pytest.mark.parametrize("model_type", published.TYPES)
def test_hidden_states_of_every_type(tmp_path, model_type):
    student, teacher = pair(tmp_path, model_type)
    ids, mask = batch(student)
    terms = layers.LayerLosses(student, teacher, "none", 0)
    found = terms(ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = terms(ids[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert (found[:, 0] > 0).all()


@pytest.mark.parametrize("model_type", published.TYPES)
def test_the_last_hidden_state_is_what_the_head_reads(tmp_path, model_type):
    _, model = pair(tmp_path, model_type)
    ids, mask = batch(model)
    states = model.hidden_states(ids, mask)
    assert len(states) == model.reader.config.num_hidden_layers + 1
    assert torch.equal(states[-1][mask], model._encode(ids, mask, None)[0][mask])
    plain = model.reader(ids, attention_mask=mask.long(), output_hidden_states=True)
    for one, other in zip(states, plain.hidden_states, strict=True):
        torch.testing.assert_close(one[mask], other[mask], rtol=1e-4, atol=1e-5)
