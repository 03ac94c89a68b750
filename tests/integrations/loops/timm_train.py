"""The order of calls of timm's train.py: mixup, smoothing, EMA, clipping, checkpoints, resume."""

from timm import create_model, utils
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch import autocast, device, inference_mode


def main(args):
    device_ = device("cpu")
    return run(args, device_)


def run(args, device):
    model = create_model(args.model, num_classes=args.num_classes)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device=device)
    dataset_train = create_dataset(
        args.dataset, root=args.data_dir, split=args.train_split, is_training=True
    )
    common_loader_kwargs = {
        "mean": data_config["mean"],
        "std": data_config["std"],
        "device": device,
        "num_workers": 0,
    }
    loader_train = create_loader(
        dataset_train,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        collate_fn=FastCollateMixup(
            mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=args.num_classes
        ),
        **common_loader_kwargs,
    )
    task = ClassificationTask(
        model=model, device=device, criterion_kwargs={"soft_targets": True}, verbose=False
    )
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(
        model,
        opt=args.opt,
        lr=0.05,
        weight_decay=0.05,
        layer_decay=args.layer_decay,
    )
    start_epoch = 0
    if args.resume:
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer, log_info=False)
    task.setup_ema(decay=0.9)
    if args.resume:
        load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        model = task.get_trainable_module()
    saver = utils.CheckpointSaver(
        model=model, optimizer=optimizer, args=args, checkpoint_dir=args.output, task=task
    )
    results = []
    for epoch in range(start_epoch, args.epochs):
        utils.random_seed(args.seed + epoch)
        task.get_trainable_module().train()
        optimizer.zero_grad()
        for index, (input, target) in enumerate(loader_train):
            with autocast("cpu", enabled=args.amp):
                result = task(input, target)
                loss = result["loss"] / args.grad_accum_steps
            loss.backward()
            if (index + 1) % args.grad_accum_steps:
                continue
            utils.dispatch_clip_grad(task.get_clip_parameters(), value=1.0, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
            results.append(loss.item())
        for evaluated in (task.get_eval_model(), task.get_eval_model(ema=True)):
            evaluated.eval()
            with inference_mode():
                evaluated(input)
        saver.save_checkpoint(epoch, metric=epoch)
    return task, results
