"""Train a classifier of mask x gender x age, with checkpoints in ./results.

    python train.py                                   # ./data, or the built-in sample dataset
    python train.py --data_dir DIR --model resnet --criterion focal --class_weights sqrt
    python train.py --data_dir DIR --n_folds 5 --fold 0 --output_dir results/fold-0
    python train.py @recipes/focal.txt --data_dir DIR # flags from a file
    python train.py ... --resume                      # continue from the last checkpoint
"""
import logging
import math
import os
import sys
from argparse import BooleanOptionalAction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # missing with PYTHONSAFEPATH

from core import distributed, run_folder
from core.checkpoint import TrainerState, list_checkpoints, model_config, save_checkpoint
from core.cli import ArgumentParser, format_flag, in_range, restores_process, run_cli
from core.device import autocast, choose_device, choose_workers, configure_backend, to_device
from core.errors import InputError
from core.framing import record_framing
from core.images import drop_bad_images
from core.labels import NUM_CLASSES
from core.layout import choose_data, dataset_folders, fingerprint, read_train
from core.optim import create_optimizer, default_rate, learning_rate, optimizer_name
from core.plots import save_inputs_sheet
from core.prediction import predict, torch_predictor
from core.report import Reporter, log_data, log_run
from core.trainer import Trainer, check_finite, explain_out_of_memory, not_finite
from dataset import (
    AUGMENTATIONS,
    SAMPLERS,
    Augmentation,
    BatchSampler,
    CropResize,
    MaskDataset,
    add_soft_targets,
    create_eval_loader,
    create_train_loader,
    split_people,
)
from f1 import score, summarize, tabulate
from loss import CLASS_WEIGHTS, LOSSES, class_weights, create_loss, soft_targets
from model import create_model, find_builder

log = logging.getLogger("mask")

# What a dataset changes about the defaults. Flags that the user gives win.
DATASET_DEFAULTS = {
    # Small drawn photos, from scratch, in minutes on two cores.
    "sample": {"resize": [80, 60], "crop": [0.85, 0.85], "augmentation": "flip",
               "weights": "none", "dropout": 0.2, "epochs": 4, "lr": 1e-3},
    # The head is in the middle. Nobody is labelled older than 60, and many people are 57 to 59.
    "competition": {"crop": [0.625, 0.667], "old_age": 58},
}


@restores_process
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, explicit = parse_args(argv)
    output_dir = Path(args.output_dir)

    # Device and processes. Only process 0 prints and writes files.
    device = distributed.init_distributed(choose_device(args.device))
    configure_backend(device, args.deterministic)
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.ERROR)
    run_folder.check_output_dir(output_dir, args.resume, args.overwrite, argv)

    # Data: read the photos, split them by person, and define the batches of the whole run.
    with distributed.main_process_first():
        data_dir, kind = choose_data(args.data_dir)
    set_defaults(args, kind, explicit)
    photos = read_train(data_dir, args.fix_labels)
    if args.on_bad_image == "skip":
        photos = distributed.run_on_main_process(drop_bad_images, photos)
    train_photos, valid_photos = split_people(photos, args.val_ratio, args.seed, args.n_folds,
                                              args.fold)
    crop_resize = CropResize(args.resize, args.crop)
    targets = soft_targets(train_photos, args.age_sigma, args.old_age)
    sampled_photos, targets = add_soft_targets(train_photos, targets, args.soft_targets, data_dir)
    train_set = MaskDataset(sampled_photos, crop_resize, Augmentation(args.augmentation), targets)
    valid_set = MaskDataset(valid_photos, crop_resize)
    sampler = BatchSampler(sampled_photos, args.batch_size, args.sampler, args.seed)
    photos_per_step = args.batch_size * args.accumulation_steps
    total_steps = math.ceil(args.epochs * len(sampled_photos) / photos_per_step)

    # Model, loss and optimizer. A run that is resumed loads its weights from the checkpoint.
    labels = train_photos.label.to_numpy()
    class_weight = class_weights(labels, args.class_weights)
    is_resumed = args.resume and list_checkpoints(output_dir)
    initial_weights = "none" if is_resumed else args.weights
    trainer = create_trainer(args, initial_weights, class_weight, device)
    config = model_config(trainer.model, args.model, crop_resize, args.tta, args.amp, {
        "class_counts": np.bincount(labels, minlength=NUM_CLASSES).tolist(),
        "data_kind": kind, **dataset_folders(data_dir)})

    # Results folder: lock it until main returns, and restore the last checkpoint if asked to.
    state = TrainerState(data=fingerprint(photos, args.soft_targets),
                         args=run_folder.recorded_flags(args))
    _lock, training_state = run_folder.open_run(args, state, argv)
    if training_state is not None:
        trainer.load_state_dict(training_state)
        del training_state  # as large as the model and its optimizer
    total_steps = run_folder.last_step(state, total_steps, args.patience)
    record_framing(config, train_photos, output_dir, state.step)  # for other photos

    log_data(train_photos, valid_photos, class_weight)
    log_run(args, trainer.model, device, total_steps)
    if distributed.rank() == 0:
        run_folder.write_args(args)
        save_inputs_sheet(train_set, sampler, output_dir / "augmented_inputs.png")

    # Training: one iterator over the batches of all steps that are left.
    signals = distributed.StopSignals()  # before loader processes start
    start = state.step * args.accumulation_steps
    stop = total_steps * args.accumulation_steps
    workers = choose_workers(args.num_workers, device)
    batches = iter(create_train_loader(train_set, sampler, start, stop, workers, device))
    valid_loader = create_eval_loader(valid_set, args.valid_batch_size, workers, device)
    reporter = Reporter(output_dir, state, total_steps, train_photos, valid_photos, summarize)
    trainer.model.train()
    for step in range(state.step + 1, total_steps + 1):
        lr = learning_rate(step, total_steps, args.lr, args.warmup)
        with explain_out_of_memory(args.batch_size, args.accumulation_steps):
            loss = train_step(trainer, islice(batches, args.accumulation_steps), step, lr)
        trainer.losses.append(loss)
        state.step = step
        state.epoch = round(step * photos_per_step / len(sampled_photos), 4)
        reporter.progress.update()
        signal_number = signals.poll(step, args.log_interval)

        # Losses are read from the device only when they are reported or saved.
        if step % args.log_interval == 0:
            reporter.log_step(trainer.losses.mean_of_last(args.log_interval, step, lr), lr)

        # Evaluate, and write a checkpoint. A stop signal writes one without an evaluation.
        must_evaluate = step % args.eval_steps == 0 or step == total_steps
        if must_evaluate or signal_number:
            trainer.losses.fetch(step, lr)
            check_finite(trainer.inference_model, step, lr)
            predictions = None
            if must_evaluate:
                metrics = {"step": step, "epoch": state.epoch, "train_loss": trainer.losses.reset()}
                if len(valid_photos):
                    predictions = evaluate(trainer, valid_loader, valid_photos, args.tta)
                    metrics |= score(predictions)
                state.history.append(metrics)
                run_folder.update_best(state)
            folder = save_checkpoint(output_dir, trainer.inference_model, config, state,
                                     predictions, trainer.state_dict())
            run_folder.prune_checkpoints(output_dir, state, args.keep_last)
            if must_evaluate:
                reporter.log_evaluation(folder)

        if signal_number and step < total_steps:
            reporter.close()
            log.info(f"stopped at step {step}/{total_steps}; resume with: "
                     f"{run_folder.resume_command(argv)}")
            # Wait for all processes: torchrun kills the others when the first one exits.
            distributed.all_gather_object(None)
            sys.exit(128 + signal_number)
        if run_folder.should_stop_early(state, args.patience) and step < total_steps:
            log.info(f"stopped early: no better macro F1 in {args.patience} evaluations")
            break

    # The best checkpoint: its score with an interval, its figures, and the next command.
    reporter.close()
    reporter.report_results()
    distributed.cleanup()


def create_trainer(args, initial_weights, class_weight, device):
    """Build model, loss and optimizer.

    Args:
        args: the flags.
        initial_weights: imagenet, none, or a file, as `create_model` takes them.
        class_weight: (18,), or None.
        device: the torch device.

    Raises:
        InputError: as `create_loss`, `check_shares` and `create_model`.
    """
    criterion = create_loss(args.criterion, class_weight, args.label_smoothing, args.gamma)
    distributed.check_shares(args.batch_size, criterion)
    # Seed here, so that earlier random draws do not change the initial weights.
    torch.manual_seed(args.seed)
    model = create_model(args.model, args.resize, initial_weights, args.dropout)
    model.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    return Trainer(
        model=model, criterion=criterion.to(device), optimizer=optimizer, device=device,
        amp=args.amp, clip_grad=args.clip_grad, ema_decay=args.ema_decay, seed=args.seed)


def train_step(trainer, batches, step, lr):
    """Do one optimizer step.

    Args:
        trainer: the `Trainer`; its model is in training mode.
        batches: iterable of (images, targets): uint8 (B, H, W, 3) and (B, 18), on the CPU.
        step: number of the step, from 1. Dropout draws from (seed, step, process).
        lr: learning rate.

    Returns:
        The mean loss of this process's photos, a tensor on the device. It is NaN if the gradient is
        not finite, except with float16.
    """
    # A resumed run draws the same dropout masks as one that was never stopped.
    seeds = np.random.SeedSequence([trainer.seed, step, distributed.rank()])
    torch.manual_seed(int(seeds.generate_state(1)[0]))

    # Forward and backward; the gradients of all batches add up.
    batches, loss = list(batches), 0.0
    for i, (images, targets) in enumerate(batches, start=1):
        images = trainer.normalize(to_device(images, trainer.device))
        targets = to_device(targets, trainer.device)
        # Processes average their gradients once per step, after the last batch.
        with distributed.no_sync(trainer.parallel_model, active=i < len(batches)):
            with autocast(trainer.device, trainer.amp):
                logits = trainer.parallel_model(images)
            batch_loss = trainer.criterion(logits.float(), targets) / len(batches)
            trainer.scaler.scale(batch_loss).backward()
        loss += batch_loss.detach()

    # Clip the gradient, update the weights, and update their moving average.
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    trainer.scaler.unscale_(trainer.optimizer)
    norm = nn.utils.clip_grad_norm_(trainer.parameters, trainer.clip_grad or math.inf)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.ema:
        trainer.ema.update(step)
    # A gradient that is not finite makes the loss NaN, so that the run ends. With float16 such a
    # gradient is normal now and then, and the scaler skips the step.
    return loss if trainer.scaler.is_enabled() else loss + 0 * norm


def evaluate(trainer, loader, photos, tta):
    """Predict the validation photos; return the table of `f1.tabulate`.

    Raises:
        InputError: if a probability is not finite.
    """
    model = trainer.inference_model
    # All processes evaluate the model that process 0 will save.
    distributed.broadcast_model(model)
    model.eval()
    predictor = torch_predictor(model, trainer.normalize, trainer.amp)
    predictions = tabulate(photos, predict([(predictor, tta)], loader, trainer.device)[0])
    trainer.model.train()  # without EMA the same model was evaluated
    if predictions.p0.isna().any():
        path = photos.path[predictions.p0.isna().argmax()]
        raise not_finite(f"{path}: a probability of the model")
    return predictions


def set_defaults(args, kind, explicit):
    """Set the defaults that depend on the dataset or on flags; given flags stay as they are."""
    defaults = {name: value for name, value in DATASET_DEFAULTS.get(kind, {}).items()
                if name not in explicit}
    vars(args).update(defaults)
    if defaults:
        flags = [text for name, value in defaults.items() for text in format_flag(name, value)]
        log.info(f"{kind} defaults: {' '.join(flags)}")
    if "lr" not in explicit:
        args.lr = default_rate(args.lr, args.batch_size * args.accumulation_steps)


def parse_args(argv=None):
    """Return (args, names of the flags that the user gave)."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    fraction, positive = in_range(float, 0, 1), in_range(int, 1)
    not_negative, not_negative_int = in_range(float, 0), in_range(int, 0)

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", help="dataset (default: SM_CHANNEL_TRAIN, ./data, or the built-in sample)")
    add("--val_ratio", type=fraction, default=0.2,
        help="fraction of the people in validation (0 = train on everyone)")
    add("--n_folds", type=not_negative_int, default=0,
        help="number of folds; replaces --val_ratio (0 = no folds)")
    add("--fold", type=not_negative_int, default=0, help="the fold to hold out, from 0")
    add("--fix_labels", action=BooleanOptionalAction, default=True,
        help="correct the known wrong labels of the competition's dataset")
    add("--on_bad_image", choices=["error", "skip"], default="error",
        help="skip: check all labelled photos first, leave out those that are damaged")
    add("--soft_targets", nargs="+", metavar="CSV",
        help="train on the eval photos, too, with these probabilities (inference.py --save_probs)")
    add("--resize", nargs=2, type=in_range(int, 16, 4097), default=[384, 288],
        metavar=("H", "W"), help="input size in pixels")
    add("--crop", nargs=2, type=in_range(float, 0.05, 1, including_high=True),
        default=[0.8, 0.95], metavar=("H", "W"), help="centre crop, as fractions of the photo")
    add("--augmentation", choices=AUGMENTATIONS, default="base",
        help="flip: mirror; base: flip, small moves, brightness, erasing; robust: larger "
             "moves, and gray, blur, noise, JPEG")
    add("--sampler", choices=SAMPLERS, default="sqrt",
        help="weight of a photo whose gender and age group has n photos: 1, 1/sqrt(n) or 1/n")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="efficientnet_b4", help="a name in model.py, or any timm model name")
    add("--weights", default="imagenet", help="imagenet, none, or a .safetensors/.pth file")
    add("--dropout", type=fraction, default=0.5, help="dropout rate before the classifier")

    add = parser.add_argument_group("loss").add_argument
    add("--criterion", choices=LOSSES, default="cross_entropy", help="loss function")
    add("--label_smoothing", type=fraction, default=0.05,
        help="amount of smoothing, for --criterion label_smoothing only")
    add("--age_sigma", type=not_negative, default=5.0,
        help="assumed error of the labelled ages in years; blurs the age groups (0 = off)")
    add("--old_age", type=in_range(int, 50, 71), default=60,
        help="age that counts as old in training; scores always use 60")
    add("--gamma", type=not_negative, default=2.0, help="gamma of the focal criteria")
    add("--class_weights", choices=CLASS_WEIGHTS, default="none",
        help="weight of a class of n photos in the loss: 1, 1/n, 1/sqrt(n), or 1 over the "
             "effective number of photos")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=5,
        help="number of epochs; one epoch draws as many photos as the training set has")
    add("--batch_size", type=positive, default=16, help="photos per batch, over all processes")
    add("--accumulation_steps", type=positive, default=1, help="batches per optimizer step")
    add("--optimizer", type=optimizer_name, default="adamw", help="any timm optimizer name")
    add("--lr", type=in_range(float, 1e-12), default=1.4e-3, help="peak learning rate; "
        "the default is for 16 photos per step, and grows with the square root of that number")
    add("--weight_decay", type=not_negative, default=0.05,
        help="weight decay (0 for norms and biases)")
    add("--warmup", type=fraction, default=0.1,
        help="fraction of all steps used for learning-rate warm-up")
    add("--clip_grad", type=not_negative, default=1.0,
        help="clip the gradient norm to this value (0 = no clipping)")
    add("--ema_decay", type=fraction, default=0.999,
        help="decay of the moving average of the weights (0 = off)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_steps", type=positive, default=500,
        help="evaluate and save a checkpoint every N optimizer steps")
    add("--tta", choices=["none", "hflip"], default="hflip",
        help="hflip: average the predictions for a photo and its mirror image")
    add("--patience", type=not_negative_int, default=0,
        help="stop after this many evaluations without improvement (0 = never)")

    add = parser.add_argument_group("run").add_argument
    # The stock scripts of this task call it --model_dir.
    add("--output_dir", "--model_dir", default="./results", help="results folder")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output_dir")
    add("--overwrite", action="store_true", help="delete the run in --output_dir first")
    add("--keep_last", type=positive, default=5, help="keep the last N checkpoints and the best")
    add("--log_interval", type=positive, default=20, help="optimizer steps between log lines")
    add("--deterministic", action=BooleanOptionalAction, default=False,
        help="bitwise reproducible on CUDA, too (slower)")
    add("--seed", type=in_range(int, 0, 2**63), default=1, help="random seed")
    parser.add_machine_flags()

    args, explicit = parser.parse_explicit(argv)
    check_args(args)
    return args, explicit


def check_args(args):
    """Raise InputError for names that do not exist and flags that contradict each other."""
    find_builder(args.model)
    is_resumed = args.resume and list_checkpoints(args.output_dir)  # the checkpoint has the weights
    if not (is_resumed or args.weights in ("imagenet", "none") or Path(args.weights).is_file()):
        raise InputError(f"--weights {args.weights}: no such file; expected imagenet, none, or a "
                         f".safetensors or .pth file")
    if args.n_folds == 1 or args.fold >= max(args.n_folds, 1):
        raise InputError(f"--n_folds {args.n_folds} --fold {args.fold}: expected 2 folds or more, "
                         f"and a fold from 0 to n_folds - 1")
    if args.n_folds and args.val_ratio == 0:
        raise InputError("--val_ratio 0 trains on everyone, --n_folds does not; pass one of them")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite contradict each other; pass one of them")
    if args.patience and not args.val_ratio:
        raise InputError("--patience needs validation, --val_ratio 0 has none; pass one of them")
    distributed.check_restarts(args.resume)


if __name__ == "__main__":
    run_cli(main)
