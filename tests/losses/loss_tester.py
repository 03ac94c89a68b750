"""The behaviours that every loss must have.

A new loss gets all of them by one class::

    class TestMyLoss(LossTester):
        make = MyLoss
        reference = staticmethod(my_naive_loops)
"""

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from kdlayers.errors import ArgumentTypeError, ShapeError

SIZES = {"batch": st.integers(2, 5), "classes": st.integers(3, 9), "seed": st.integers(0, 2**16)}


OLD = not torch.cuda.is_available() and torch.__version__ < "2.13"


class LossTester:
    make: ClassVar[Any]
    """Makes the loss, without arguments."""
    reference: ClassVar[Any]
    """reference(loss, student, teacher, targets) -> float, by plain loops over Python numbers."""
    kind: ClassVar[str] = "logits"
    """"logits" [B, K], "scores" [B, H, W, K] with an assignment, or "maps" [B, C, H, W]."""
    needs_labels: ClassVar[bool] = False
    warns_on_two_classes: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = True
    """Whether adding a number to all of a sample's (position's) student values changes nothing."""
    metrics: ClassVar[tuple[str, ...]] = ()
    autocast_tolerance: ClassVar[float] = 1e-6

    def inputs(self, batch=4, classes=5, dtype=torch.float64, seed=0, spread=2.0):
        draw = torch.Generator().manual_seed(seed)
        shape = {
            "logits": (batch, classes),
            "scores": (batch, 2, 3, classes),
            "maps": (batch, min(classes, 32) + 1, 3, 2),
        }[self.kind]
        student = spread * torch.randn(shape, generator=draw, dtype=torch.float64)
        teacher = spread * torch.randn(shape, generator=draw, dtype=torch.float64)
        if self.kind == "scores":
            teacher = teacher.softmax(dim=-1)
        targets = torch.randint(classes, (batch,), generator=draw)
        return student.to(dtype), teacher.to(dtype), targets

    def fresh(self, student, teacher):
        """A loss that can be called."""
        return type(self).make()

    def ready(self, student, teacher):
        """Like fresh, with parameters that differ from their special initial values."""
        loss = self.fresh(student, teacher)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss.build(student, teacher)
            for parameter in loss.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        return loss

    def test_value_equals_naive_loops(self):
        @given(**SIZES)
        @settings(max_examples=15, deadline=None)
        def check(batch, classes, seed):
            student, teacher, targets = self.inputs(batch, classes, seed=seed)
            loss = self.ready(student, teacher)
            value = loss(student, teacher, targets)
            assert value.shape == ()
            expected = type(self).reference(loss, student, teacher, targets)
            assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)

        check()

    def test_gradients_equal_differences(self):
        student, teacher, targets = self.inputs(batch=2, classes=3)
        loss = self.ready(student, teacher)
        free = [student.requires_grad_(), *loss.parameters()]
        assert torch.autograd.gradcheck(lambda *_: loss(student, teacher, targets), free)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_saturated_inputs_stay_finite(self, dtype):
        _, _, targets = self.inputs(batch=6)
        student, teacher, _ = (t.sign() for t in self.inputs(batch=6))
        student = (150 * student).to(dtype).requires_grad_()
        teacher = teacher.to(dtype) if self.kind == "scores" else (150 * teacher).to(dtype)
        loss = self.ready(student.detach(), teacher)
        value = loss(student, teacher, targets)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        for tensor in (student, *loss.parameters()):
            assert tensor.grad.isfinite().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_teacher_without_finite_numbers_is_not_hidden(self, value):
        student, teacher, targets = self.inputs()
        loss = self.ready(student, teacher)
        teacher.view(-1)[:: teacher.numel() // 3] = value
        assert not loss(student, teacher, targets).isfinite()

    def test_autocast_changes_nothing(self):
        student, teacher, targets = self.inputs(dtype=torch.float32)
        loss = self.ready(student, teacher)
        plain = loss(student, teacher, targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = loss(student, teacher, targets)
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain, rtol=self.autocast_tolerance, atol=1e-6)

    def test_a_shift_of_the_student_changes_nothing(self):
        if not self.shift_invariant:
            pytest.skip("the loss depends on the student's absolute values")

        @given(shift=st.floats(-50, 50), seed=st.integers(0, 999))
        @settings(max_examples=10, deadline=None)
        def check(shift, seed):
            student, teacher, targets = self.inputs(seed=seed)
            loss = self.fresh(student, teacher)
            expected = loss(student, teacher, targets)
            torch.testing.assert_close(loss(student + shift, teacher, targets), expected)

        check()

    def test_gradient_reaches_what_it_must_and_no_more(self):
        student, teacher, targets = self.inputs()
        loss = self.ready(student, teacher)
        student.requires_grad_()
        teacher.requires_grad_()
        loss(student, teacher, targets).backward()
        assert student.grad.abs().sum() > 0
        assert (teacher.grad is None) == loss.detaches_teacher
        for name, parameter in loss.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_copies_and_saved_states_give_the_same_value(self):
        student, teacher, targets = self.inputs()
        loss = self.ready(student, teacher)
        expected = loss(student, teacher, targets)
        fresh = type(self).make()
        fresh.load_state_dict(loss.state_dict())
        assert list(fresh.state_dict()) == list(loss.state_dict())
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), fresh):
            assert torch.equal(twin(student, teacher, targets), expected)
            assert (twin.at, twin.name, twin.weight) == (loss.at, loss.name, loss.weight)

    def test_compiles_to_one_graph(self):
        torch._dynamo.reset()
        student, teacher, targets = self.inputs(dtype=torch.float32)
        loss = self.ready(student, teacher)
        student.requires_grad_()
        expected = loss(student, teacher, targets)
        (slope,) = torch.autograd.grad(expected, student)
        counter = CompileCounter()
        compiled = torch.compile(loss, fullgraph=True, backend=counter)
        for _ in range(4):
            value = compiled(student, teacher, targets)
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value, student)[0], slope)
        assert set(loss.metrics()) == set(type(self).metrics)
        assert counter.frame_count <= 2  # what it records may cost one more compilation, not four

    @pytest.mark.skipif(OLD, reason="asks the driver even for fake tensors")
    def test_never_waits_for_an_accelerator(self):
        student, teacher, targets = self.inputs(dtype=torch.float32)
        loss = self.ready(student, teacher)
        state = loss.state_dict()
        # Fake tensors hold no values: reading one, as .item() does, is an error.
        with FakeTensorMode() as fake:

            def move(tensor):
                return fake.from_tensor(tensor).to("cuda")

            moved = {name: move(value) for name, value in state.items()}
            value = functional_call(loss, moved, tuple(map(move, (student, teacher, targets))))
        assert value.device.type == "cuda"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_a_gpu_gives_the_same_value_and_gradient(self, dtype):
        student, teacher, targets = self.inputs(dtype=dtype)
        loss = self.ready(student, teacher)
        found = {}
        for device in ("cpu", "cuda"):
            free = student.to(device).detach().requires_grad_()
            value = loss.to(device)(free, teacher.to(device), targets.to(device))
            (slope,) = torch.autograd.grad(value, free)
            found[device] = value.detach().cpu(), slope.cpu()
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
        torch.testing.assert_close(found["cuda"], found["cpu"], **tolerance)

    @pytest.mark.parametrize(("batch", "classes"), [(4, 2), (3, 1000), (1, 5)])
    def test_few_and_many_classes_and_a_batch_of_one(self, batch, classes):
        student, teacher, targets = self.inputs(batch, classes, torch.float32)
        loss = self.fresh(student, teacher)
        student.requires_grad_()
        if classes == 2 and self.warns_on_two_classes:
            with pytest.warns(UserWarning, match="with 2 classes .* always 0"):
                value = loss(student, teacher, targets)
        else:
            value = loss(student, teacher, targets)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()

    def test_leaves_random_state_and_inputs_alone(self):
        student, teacher, targets = self.inputs()
        loss = self.ready(student, teacher)
        before = torch.random.get_rng_state()
        copies = student.clone(), teacher.clone(), targets.clone()
        loss(student, teacher, targets)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(map(torch.equal, (student, teacher, targets), copies))

    def test_metrics_are_detached_scalars(self):
        student, teacher, targets = self.inputs()
        loss = self.ready(student, teacher)
        loss(student.requires_grad_(), teacher, targets)
        assert set(loss.metrics()) == set(type(self).metrics)
        for value in loss.metrics().values():
            assert value.shape == ()
            assert not value.requires_grad

    def test_wrong_shapes_are_refused_with_both_shapes(self):
        student, teacher, targets = self.inputs()
        loss = self.fresh(student, teacher)
        for wrong in (teacher[:-1], teacher[0]):
            with pytest.raises(ShapeError, match=r"(?s)must (be|have).*got.*\d"):
                loss(student, wrong, targets)
        with pytest.raises(ShapeError, match="got"):
            loss(student[:0], teacher[:0], targets[:0])

    def test_wrong_types_are_refused(self):
        student, teacher, targets = self.inputs()
        with pytest.raises(ArgumentTypeError, match="student must be a floating-point tensor"):
            self.fresh(student, teacher)(student.long(), teacher, targets)
        with pytest.raises(ArgumentTypeError, match="teacher must be a tensor, got list"):
            self.fresh(student, teacher)(student, teacher.tolist(), targets)

    def test_labels_are_needed_one_a_sample(self):
        student, teacher, targets = self.inputs()
        loss = self.fresh(student, teacher)
        if not self.needs_labels:
            value = loss(student, teacher)
            assert torch.equal(value, loss(student, teacher, None))
            return
        with pytest.raises(ArgumentTypeError, match=r"Loss needs the labels"):
            loss(student, teacher)
        soft = torch.nn.functional.one_hot(targets, 5).double()
        assert torch.equal(loss(student, teacher, soft), loss(student, teacher, targets))
        with pytest.raises(ShapeError, match=r"for one-hot rows pass targets.float\(\)"):
            loss(student, teacher, soft.long())
        with pytest.raises(ValueError, match=r"targets must lie in 0..4 for 5 classes, got .* 5"):
            loss(student, teacher, torch.full_like(targets, 5))
        for integer in (torch.int32, torch.uint8):
            same = loss(student, teacher, targets.to(integer))
            assert torch.equal(same, loss(student, teacher, targets))
