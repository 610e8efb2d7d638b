"""What a training run says: what the flags amounted to, a line as it goes, TensorBoard, and the last word."""
import json
import logging
import shlex
import shutil

import numpy as np
import pandas as pd

from checkpoint import find_checkpoint, step_of
from distributed import world_size
from f1 import bootstrap_interval, macro_f1
from layout import AGES, CLASS_NAMES, GENDERS, NUM_CLASSES
from plots import confusion_matrix, mistakes_sheet

log = logging.getLogger("mask")


def describe_data(train_photos, valid_photos, weight):
    """Who is on either side of the split, and what the classes of the training side weigh."""
    for name, photos in [("training", train_photos), ("validation", valid_photos)]:
        groups = photos.drop_duplicates("person").groupby(["gender", "age"]).size()
        detail = ", ".join(f"{GENDERS[g]} {AGES[a]} {n}" for (g, a), n in groups.items())
        log.info(f"{name}: {photos.person.nunique()} people, {len(photos)} photos ({detail})")
    counts = np.bincount(train_photos.label, minlength=NUM_CLASSES)
    log.info(f"class counts: {' '.join(map(str, counts))}")
    if weight is not None:
        log.info(f"class weights: {' '.join(f'{w:.2f}' for w in weight.tolist())}")
    if (counts == 0).any():
        log.warning(f"warning: no training photo of {', '.join(CLASS_NAMES[i] for i in np.flatnonzero(counts == 0))}")


def describe_run(args, model, device, total_steps):
    """What the flags amounted to."""
    parameters = sum(p.numel() for p in model.parameters())
    log.info(f"model: {args.model}, {parameters / 1e6:.1f} M parameters, {args.head} head, weights {args.weights}, "
             f"input {args.resize[0]} x {args.resize[1]} (height x width), crop {args.crop[0]:g} x {args.crop[1]:g}")
    log.info(f"loss: {args.criterion}, class weights {args.class_weights}, sampler {args.sampler}, "
             f"augmentation {args.augmentation}")
    log.info(f"steps: {total_steps} of {args.batch_size * args.accumulation_steps} photos"
             f"{f', shared by {world_size()} processes' if world_size() > 1 else ''} ({args.epochs} epochs), "
             f"{args.optimizer}, peak learning rate {args.lr:g}, evaluation every {args.eval_steps}")
    log.info(f"device: {device}, results in {args.output_dir}")


def create_board(output_dir, step):
    # Slow to import; an error in the flags or the data should not wait for it.
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1 if step else None)


def report_step(bar, board, step, total_steps, loss, rate, speed):
    board.add_scalar("train/loss", loss, step)
    board.add_scalar("train/learning_rate", rate, step)
    board.add_scalar("train/images_per_second", speed, step)
    if bar.disable:
        log.info(f"step {step}/{total_steps}  loss {loss:.4f}  lr {rate:.3g}  {speed:.1f} images/s")
    else:
        bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.3g}, {speed:.1f} images/s")


def report_metrics(bar, board, history, folder):
    """The newest evaluation as a line, in TensorBoard, and in log.jsonl beside the earlier ones."""
    write_log(history, folder.parent)
    metrics = history[-1]
    board.add_scalar("train/mean_loss", metrics["train_loss"], metrics["step"])
    line = f"step {metrics['step']}  train loss {metrics['train_loss']:.4f}"
    if "macro_f1" in metrics:
        names = ["log_loss", "macro_f1", "accuracy", "mask_f1", "gender_f1", "age_f1"]
        line += "  " + "  ".join(f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in names)
        for name in names:
            board.add_scalar(f"valid/{name}", metrics[name], metrics["step"])
        for name, value in zip(CLASS_NAMES, metrics["class_f1"], strict=True):
            board.add_scalar(f"class_f1/{name}", value, metrics["step"])
    bar.clear()
    log.info(f"{line}  -> {folder}")


def write_log(history, output_dir):
    # Written anew: after a resume there is no line of steps that were lost.
    (output_dir / "log.jsonl").write_text("".join(json.dumps(metrics) + "\n" for metrics in history))


def finish(state, output_dir, valid_photos, board):
    """The best score with its interval, the figures of the best checkpoint, and the next command."""
    best = find_checkpoint(output_dir)
    write_log(state["history"], output_dir)
    if len(valid_photos):
        predictions = pd.read_csv(shutil.copy(best / "valid_predictions.csv", output_dir))
        labels, answers = predictions.label.to_numpy(), predictions["ans"].to_numpy()
        low, high = bootstrap_interval(labels, answers, predictions.person)
        log.info(f"best macro F1 {macro_f1(labels, answers):.4f} at step {step_of(best)}, the best of {len(state['history'])} "
                 f"evaluations on {len(labels)} photos of {predictions.person.nunique()} people "
                 f"(95 % interval over people {low:.4f} .. {high:.4f}; choosing the best makes it a little too high)")
        matrix = confusion_matrix(labels, answers, output_dir / "confusion_matrix.png")
        board.add_image("valid/confusion_matrix", matrix, state["best_step"], dataformats="HWC")
        sheet = mistakes_sheet(predictions, valid_photos.path, output_dir / "worst_mistakes.png")
        if sheet is not None:
            board.add_image("valid/worst_mistakes", sheet, state["best_step"], dataformats="HWC")
    else:
        log.info(f"trained on everyone, without validation, for {state['step']} steps")
    board.close()
    log.info(f"next: python inference.py --model_dir={shlex.quote(str(best) if best.is_absolute() else f'./{best}')}")
