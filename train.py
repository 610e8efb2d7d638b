"""Train a classifier of mask x gender x age, and leave checkpoints in ./results.

    python train.py                                    # ./data, or the built-in sample dataset if there is none
    python train.py --data_dir DIR --model resnet --criterion focal --class_weights sqrt
    python train.py --data_dir DIR --n_folds 5 --fold 0 --output_dir results/fold-0
    python train.py ... --resume                       # go on from the last checkpoint
"""
import logging
import math
import shlex
import sys
import time
from argparse import BooleanOptionalAction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from tqdm import tqdm

import distributed
from augmentation import AUGMENTATIONS, Augmentation
from check_data import drop_bad_images
from checkpoint import list_checkpoints, model_config, save_checkpoint
from dataset import SAMPLERS, EpochSampler, Geometry, Loader, MaskDataset, moved_ahead, normalize
from device import autocast, choose_device, choose_workers, half_precision, tune
from errors import ArgumentParser, InputError, reason, run
from f1 import score, tabulate
from inference import infer, torch_predictor
from layout import NUM_CLASSES, choose_data, fingerprint, read_train, record_data, split_people
from loss import CLASS_WEIGHTS, LOSSES, LogitAdjustedLoss, class_weights, create_loss, soft_targets
from model import HEADS, TTA, create_model, find_builder, input_statistics
from optim import check_optimizer, create_optimizer, learning_rate
from plots import inputs_sheet
from report import create_board, describe_data, describe_run, finish, report_metrics, report_step
from run_folder import (
    RESUMABLE,
    as_flag,
    check_output_dir,
    claim,
    is_exhausted,
    prune_checkpoints,
    resume,
    resume_argv,
    update_best,
    was_begun_by_this_start,
)
from sample_data import draw_sample_dataset

log = logging.getLogger("mask")

# What a dataset changes about the defaults; any flag on the command line wins over it.
DATASET_DEFAULTS = {
    # Small drawn photos, from scratch, in minutes on two cores.
    "sample": {"resize": [80, 60], "crop": [0.85, 0.85], "augmentation": "flip", "weights": "none", "dropout": 0.2, "epochs": 4,
               "lr": 1e-3},
    # The competition's own photos show a head in their middle, and everyone who is old is labelled 60 beside many of 57 to 59.
    "competition": {"crop": [0.625, 0.667], "old_age": 58},
}
NOT_FINITE = ("nothing was saved of it; lower --lr, set --clip_grad, or pass --no-amp, and begin again with --overwrite or another "
              "--output_dir")


def main(argv=None):
    logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    device = distributed.join(choose_device(args.device))
    if distributed.from_main(was_begun_by_this_start(output_dir)):  # torchrun has started this again: go on
        argv = resume_argv(argv)
        args = parse_args(argv)
    tune(device, args.deterministic)
    is_main = distributed.rank() == 0
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    check_output_dir(output_dir, args.resume, args.overwrite, argv)
    with distributed.main_first():
        data_dir, kind = choose_data(args.data_dir, draw_sample_dataset)
    if DATASET_DEFAULTS.get(kind):
        args = parse_args(argv, DATASET_DEFAULTS[kind])
        log.info(f"{kind} defaults: {' '.join(as_flag(key, value) for key, value in DATASET_DEFAULTS[kind].items())}")

    # data
    photos = read_train(data_dir, args.fix_labels)
    if args.on_bad_image == "skip":
        photos = drop_bad_images(photos)
    train_photos, valid_photos = split_people(photos, args.val_ratio, args.seed, args.n_folds, args.fold)
    geometry = Geometry(args.resize, args.crop)
    sampler = EpochSampler(train_photos, args.batch_size, args.sampler, args.seed)
    targets = soft_targets(train_photos, args.age_sigma, args.old_age)
    train_set = MaskDataset(train_photos, geometry, Augmentation(args.augmentation), targets)
    num_workers = choose_workers(args.num_workers, device)
    train_loader = Loader(train_set, num_workers, device, batch_sampler=sampler)
    valid_loader = Loader(MaskDataset(valid_photos, geometry), num_workers, device, args.valid_batch_size)
    steps_per_epoch = math.ceil(sampler.num_batches / args.accumulation_steps)
    total_steps = args.epochs * steps_per_epoch

    # model
    torch.manual_seed(args.seed)
    weights = "none" if args.resume and list_checkpoints(output_dir) else args.weights  # a checkpoint will bring its own
    model = create_model(args.model, args.resize, args.head, weights, args.dropout)
    model.to(device, memory_format=torch.channels_last)
    statistics = input_statistics(model)
    labels = train_photos.label.to_numpy()
    weight = class_weights(labels, args.class_weights)
    criterion = create_loss(args.criterion, weight, args.label_smoothing, args.gamma)
    criterion = LogitAdjustedLoss(criterion, labels, args.logit_adjustment).to(device)
    distributed.check_processes(criterion, sampler)
    optimizer = create_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    # Skips an update whose gradient is not finite, for a fused optimizer without making the host wait; it scales for float16 only.
    is_float16 = args.amp is not False and device.type == "cuda" and half_precision(device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=device.type != "mps",
                                  **({} if is_float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}))
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    inference_model = ema.module if ema else model
    config = model_config(model, args.model, geometry, args.tta, args.amp, {
        "class_counts": np.bincount(labels, minlength=NUM_CLASSES).tolist(), **record_data(data_dir)})

    # where it goes, and where it goes on
    state = {"step": 0, "epoch": 0, "best_step": None, "best_macro_f1": None, "history": [], "data": fingerprint(photos),
             "args": {key: value for key, value in sorted(vars(args).items()) if key not in RESUMABLE}}
    with distributed.main_first():
        lock = claim(output_dir, args.resume, args.overwrite, argv) if is_main else None
        training_state = resume(output_dir, state) if args.resume else None
    losses, unread = [], []  # since the last evaluation: as floats, and on the device
    if len(set(distributed.gather(state["step"]))) > 1:
        raise InputError(f"--output_dir {output_dir}: the processes see different checkpoints in it; expected a folder that all "
                         f"machines share")
    if training_state is not None:
        try:
            model.load_state_dict(training_state["model"])
            optimizer.load_state_dict(training_state["optimizer"])
            if training_state["scaler"].get("growth_interval") == scaler.state_dict().get("growth_interval"):  # same kind of device
                scaler.load_state_dict(training_state["scaler"])
            if ema:
                ema.module.load_state_dict(training_state["ema"])
            losses = training_state["losses"].tolist()
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: the last checkpoint in {output_dir} does not fit --model {args.model} as it is now "
                             f"({reason(error)}); pass another --output_dir") from None

    describe_data(train_photos, valid_photos, weight)
    describe_run(args, model, device, total_steps)
    if is_main:
        board = create_board(output_dir, state["step"])
        sheet = inputs_sheet(train_set, sampler, output_dir / "augmented_inputs.png")
        board.add_image("inputs/augmented", sheet, 0, dataformats="HWC")
    parallel_model = distributed.wrap(model)
    predictor = torch_predictor(inference_model, statistics, args.amp)

    def rate_at(step):
        return learning_rate(step, total_steps, args.lr, args.warmup)

    def train_step(batches, step):
        """An optimizer step over batches of ((images, targets), photos in all processes together): their mean loss, still on the
        device; it is not finite if the gradient is not."""
        photos, loss = sum(size for _, size in batches), 0.0
        for i, ((images, targets), _) in enumerate(batches, start=1):
            share = len(images) * distributed.world_size() / photos  # the gradient will be the mean over the processes
            images = normalize(images, *statistics)
            with distributed.without_sync(parallel_model, i == len(batches)):
                with autocast(device, args.amp):
                    logits = parallel_model(images)
                part = share * criterion(logits.float(), targets)
                scaler.scale(part).backward()
            loss += part.detach()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(model, step)
        return loss if is_float16 else loss + 0 * norm  # of float16 the scaler skips what overflows, as a matter of course

    def read_losses(step):
        """Fetch the losses that were not read yet from the device; InputError if one, or a gradient, is not finite."""
        values = distributed.mean(torch.stack(unread)).tolist() if unread else []
        unread.clear()
        losses.extend(values)
        if not np.isfinite(values).all():
            bad = step - len(values) + 1 + int(np.argmin(np.isfinite(values)))
            sampler.set_epoch((bad - 1) // steps_per_epoch, (bad - 1) % steps_per_epoch * args.accumulation_steps)
            batches = list(islice(sampler, args.accumulation_steps))
            own = [train_photos.path[index] for batch in batches for index, _ in batch]
            paths = [path for share in distributed.gather(own) for path in share]
            if is_main:
                (output_dir / "bad_batch.txt").write_text("\n".join(paths) + "\n")
            raise InputError(f"the loss or the gradient of step {bad} is not finite (learning rate {rate_at(bad):.2g}; {paths[0]} "
                             f"and its other photos are in {output_dir / 'bad_batch.txt'}); {NOT_FINITE}")

    def save(predictions):
        if not is_main:
            return None
        folder = save_checkpoint(output_dir, inference_model, config, state, predictions, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "ema": ema.module.state_dict() if ema else None, "losses": torch.tensor(losses)})
        prune_checkpoints(output_dir, args.keep_last)
        return folder

    bar = tqdm(total=total_steps, initial=state["step"], disable=None if is_main else True, unit="step", desc="train")
    recent, since, stopper = 0, time.perf_counter(), distributed.Stopper()
    is_over = state["step"] >= total_steps or is_exhausted(state, args.patience)
    if is_over:
        more = "more --epochs" if state["step"] >= total_steps else "--patience 0"
        log.info(f"the run is complete: {state['step']} of {total_steps} steps; pass {more} to train on")
    for epoch in range(state["step"] // steps_per_epoch, 0 if is_over else args.epochs):
        sampler.set_epoch(epoch, state["step"] % steps_per_epoch * args.accumulation_steps)
        batches = zip(moved_ahead(train_loader, device), sampler.sizes(), strict=True)
        for step, loss, count in train_one_epoch(model, batches, args.accumulation_steps, train_step, args.seed, state["step"]):
            unread.append(loss)
            recent += count
            bar.update()
            state |= {"step": step, "epoch": round(step / steps_per_epoch, 4)}
            stop_signal = stopper.agreed(step, args.log_interval)
            if step % args.log_interval == 0:
                read_losses(step)
                speed = recent / (time.perf_counter() - since)
                if is_main:
                    report_step(bar, board, step, total_steps, float(np.mean(losses[-args.log_interval:])),
                                rate_at(step), speed)
                recent, since = 0, time.perf_counter()
            if step % args.eval_steps == 0 or step == total_steps:
                read_losses(step)
                metrics = {"step": step, "epoch": state["epoch"], "train_loss": float(np.mean(losses))}
                losses.clear()
                check_weights(model, inference_model, step, rate_at(step))
                predictions = None
                if len(valid_photos):
                    distributed.copy_main(inference_model)
                    inference_model.eval()
                    predictions = evaluate(predictor, args.tta, valid_loader, valid_photos, device)
                    metrics |= score(predictions)
                state["history"].append(metrics)
                update_best(state)
                folder = save(predictions)
                if is_main:
                    report_metrics(bar, board, state["history"], folder)
                recent, since = 0, time.perf_counter()
                if is_exhausted(state, args.patience):
                    break
            elif stop_signal:
                read_losses(step)
                check_weights(model, inference_model, step, rate_at(step))
                save(None)
            if stop_signal and step < total_steps:
                bar.close()
                log.info(f"stopped at step {step} of {total_steps}; go on with: "
                         f"{distributed.command_prefix()} train.py {shlex.join(resume_argv(argv))}")
                distributed.gather(None)  # torchrun ends the others with the first that leaves
                sys.exit(128 + stop_signal)
        if is_exhausted(state, args.patience):
            log.info(f"stopped early: no better macro F1 in {args.patience} evaluations")
            break
    bar.close()
    if is_main:
        finish(state, output_dir, valid_photos, board)
        lock.close()
    distributed.leave()


def train_one_epoch(model, batches, accumulation_steps, train_step, seed, step):
    """Train over an epoch's batches; a generator that stops after each optimizer step.

    Args:
        model: put into training mode before every step, since an evaluation may have come between.
        batches: of ((images, targets) on the device, photos of the batch in all processes together).
        accumulation_steps: batches to an optimizer step.
        train_step: (list of batches, number of the step) -> loss.
        seed: dropout and its like draw from (seed, step), so that a resumed run draws the same.
        step: optimizer steps done before.

    Yields:
        (step, loss, photos): steps done; what `train_step` gave (reading it would make the host wait); photos of the step.
    """
    rank = distributed.rank()
    while group := list(islice(batches, accumulation_steps)):
        step += 1
        model.train()
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank] if rank else [seed, step]).generate_state(1)[0]))
        yield step, train_step(group, step), sum(size for _, size in group)


def evaluate(predictor, tta, loader, photos, device):
    """Predict the validation photos: the table of `tabulate`."""
    predictions = tabulate(photos, infer([(predictor, tta)], loader, device)[0])
    if predictions.p0.isna().any():
        raise InputError(f"{photos.path[predictions.p0.isna().argmax()]}: the model gives no finite probability; {NOT_FINITE}")
    return predictions


def check_weights(model, inference_model, step, rate):
    """InputError if a weight is not finite: the step's own update, which no loss has seen yet, may have spoilt it."""
    for weights in (model, inference_model):
        for name, value in weights.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{name} is not finite after step {step} (learning rate {rate:.2g}); {NOT_FINITE}")


def parse_args(argv=None, defaults=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    # data
    parser.add_argument("--data_dir", help="dataset, its train folder or train/images (else SM_CHANNEL_TRAIN, ./data, the sample)")
    parser.add_argument("--val_ratio", type=float, default=0.2, help="share of the people held out; 0 trains on everyone")
    parser.add_argument("--n_folds", type=int, default=0, help="hold out one of this many folds of people instead of --val_ratio")
    parser.add_argument("--fold", type=int, default=0, help="the fold to hold out, from 0")
    parser.add_argument("--fix_labels", action=BooleanOptionalAction, default=True, help="mend the original dataset's wrong labels")
    parser.add_argument("--on_bad_image", choices=["error", "skip"], default="error",
                        help="skip: look at every photo first, and leave out what cannot be decoded")
    parser.add_argument("--resize", nargs=2, type=int, default=[384, 288], metavar=("H", "W"), help="input size in pixels")
    parser.add_argument("--crop", nargs=2, type=float, default=[0.8, 0.95], metavar=("H", "W"), help="centre crop, as fractions")
    parser.add_argument("--augmentation", choices=AUGMENTATIONS, default="base", help="random changes in training")
    parser.add_argument("--sampler", choices=SAMPLERS, default="sqrt", help="draw rare gender x age groups more often")
    # model
    parser.add_argument("--model", default="efficientnet_b4", help="a name in model.py's MODELS, or any timm name")
    parser.add_argument("--head", choices=HEADS, default="factored", help="18 logits, or mask + gender + age logits summed into 18")
    parser.add_argument("--weights", default="imagenet", help="imagenet, none, or a .safetensors/.pth file to start from")
    parser.add_argument("--dropout", type=float, default=0.5, help="dropout rate before the head")
    # loss
    parser.add_argument("--criterion", choices=LOSSES, default="label_smoothing", help="loss")
    parser.add_argument("--label_smoothing", type=float, default=0.05, help="of the criterion label_smoothing")
    parser.add_argument("--age_sigma", type=float, default=5.0, help="years that an age may be off: softens the target; 0: not")
    parser.add_argument("--old_age", type=int, default=60, help="years that count as old in training; scores always count from 60")
    parser.add_argument("--gamma", type=float, default=2.0, help="of the focal criteria")
    parser.add_argument("--class_weights", choices=CLASS_WEIGHTS, default="none", help="from the training photos' counts")
    parser.add_argument("--logit_adjustment", type=float, default=0.4, help="tau: how far predictions lean to rare people; 0: not")
    # optimization
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training photos")
    parser.add_argument("--batch_size", type=int, default=16, help="training photos to a batch, of all processes together")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="batches to an optimizer step")
    parser.add_argument("--optimizer", default="adamw", help="adamw, sgd, or another of timm's")
    parser.add_argument("--lr", type=float, default=1.4e-3, help="peak learning rate")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="not on norms and biases")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises")
    parser.add_argument("--clip_grad", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    parser.add_argument("--ema_decay", type=float, default=0.999, help="average of the weights, evaluated and saved; 0: none")
    parser.add_argument("--tta", choices=TTA, default="hflip", help="evaluate and predict the mean of a photo and its mirror image")
    parser.add_argument("--patience", type=int, default=0, help="stop after this many evaluations without a better one; 0: never")
    # run
    parser.add_argument("--eval_steps", type=int, default=500, help="optimizer steps between evaluations, each with a checkpoint")
    parser.add_argument("--log_interval", type=int, default=20, help="optimizer steps between lines of the loss")
    parser.add_argument("--output_dir", "--model_dir", default="./results", help="results folder")
    parser.add_argument("--keep_last", type=int, default=5, help="checkpoints that stay beside the best")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output_dir")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --output_dir first")
    parser.add_argument("--valid_batch_size", type=int, default=64, help="photos at a time in evaluation, in each process")
    parser.add_argument("--num_workers", type=int, default=-1, help="loader processes; -1: on a GPU up to 8, on the CPU none")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--amp", action=BooleanOptionalAction, help="mixed precision (default: on CUDA only)")
    parser.add_argument("--deterministic", action=BooleanOptionalAction, default=False,
                        help="on CUDA, too, equal runs give equal bits; slower")
    parser.add_argument("--seed", type=int, default=1, help="of everything random")
    parser.set_defaults(**defaults or {})
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """InputError for a value out of range, or flags that contradict each other."""
    for names, low, high in [
        ("epochs batch_size valid_batch_size accumulation_steps eval_steps log_interval keep_last", 1, None),
        ("resize", 16, 4096), ("val_ratio dropout label_smoothing ema_decay warmup", 0, 1), ("crop", 0.05, None),
        ("weight_decay gamma age_sigma logit_adjustment clip_grad patience seed", 0, None),
        ("lr", 1e-12, None), ("old_age", 50, 71), ("num_workers", -1, None),
    ]:
        for name in names.split():
            value = getattr(args, name)
            for number in value if isinstance(value, list) else [value]:
                if not low <= number < (high or math.inf):
                    below = f" and below {high}" if high else ""
                    raise InputError(f"--{name} {number}: out of range; expected at least {low}{below}")
    find_builder(args.model)
    if args.weights not in ("imagenet", "none") and not Path(args.weights).is_file():
        raise InputError(f"--weights {args.weights}: no such weights file; expected imagenet, none, or a .safetensors or .pth file")
    check_optimizer(args.optimizer)
    create_loss(args.criterion, None if args.class_weights == "none" else torch.ones(NUM_CLASSES))
    if max(args.crop) > 1:
        raise InputError(f"--crop {args.crop[0]:g} {args.crop[1]:g}: out of range; expected fractions of the photo, at most 1")
    if args.n_folds == 1 or args.n_folds < 0 or not 0 <= args.fold < max(args.n_folds, 1):
        raise InputError(f"--n_folds {args.n_folds} --fold {args.fold}: expected 2 folds or more, and a fold from 0 to n_folds - 1")
    if args.n_folds and args.val_ratio == 0:
        raise InputError("--val_ratio 0 trains on everyone and --n_folds holds a fold out; pass one of them")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite contradict each other; pass one of them")
    if args.patience and not args.val_ratio and not args.n_folds:
        raise InputError("--patience needs validation, which --val_ratio 0 turns off; pass one of them")


if __name__ == "__main__":
    run(main)
