"""The order of calls of transformers' run_image_classification.py, on random images."""

import torch
from transformers import AutoModelForImageClassification, Trainer


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["labels"] for example in examples])
    return {"pixel_values": pixel_values, "labels": labels}


def main(args):
    training_args, dataset = args.training_args, args.dataset
    _train_transforms, val_transforms = args.augment, args.plain
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
    dataset["train"].set_transform(_train_transforms)
    dataset["validation"].set_transform(val_transforms)
    # Initialize our trainer
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=collate_fn,
    )
    # Training
    checkpoint = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.evaluate()
    return trainer
