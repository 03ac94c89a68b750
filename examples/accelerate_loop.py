"""letKD in a loop with Hugging Face Accelerate: attach, prepare, register the handle, resume."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _digits import EXAMPLE, SIZES, Parser, accuracy, digits, losses, points, trained_teacher
from _models import make_student
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from kdlayers import attach_kd, save_student


def main() -> None:
    """One process of however many there are."""
    options = Parser(__doc__, "accelerate")
    options.add_argument("--accumulate", type=int, default=1, help="batches per step; default: 1")
    options.add_argument("--resume", metavar="DIR", help="a folder of save_state to go on from")
    args = options.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    images = digits(args.quick)
    with accelerator.main_process_first():
        teacher = trained_teacher(images, args)
    teacher.to(accelerator.device)  # by hand: what goes through prepare gets into save_state

    set_seed(0)
    student = make_student(*SIZES)
    # After Accelerator(), which starts the processes; before the optimiser and prepare.
    kd = attach_kd(student, teacher, points(), losses=losses(), example=EXAMPLE)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *kd.parameters()], args.lr, momentum=0.9, nesterov=True
    )
    loader = DataLoader(images.augmented, args.batch_size, shuffle=True, drop_last=True)
    plain = DataLoader(images.plain, args.batch_size)
    model, optimizer, loader, plain = accelerator.prepare(student, optimizer, loader, plain)
    accelerator.register_for_checkpointing(kd)  # targets, train-only parameters and the step
    if args.resume:
        accelerator.load_state(args.resume)
    kd.fit(plain, progress=accelerator.is_main_process)  # nothing is left to fit after load_state

    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y) + kd.loss(y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_([*student.parameters(), *kd.parameters()], 5.0)
                optimizer.step()
                optimizer.zero_grad()
        percent = accuracy(accelerator.unwrap_model(model), images)
        accelerator.print(f"epoch {epoch + 1}, step {kd.step}: {percent:.2f} %", flush=True)

    accelerator.save_state(args.out / "state")
    if accelerator.is_main_process:
        save_student(accelerator.unwrap_model(model), args.out / "student.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
