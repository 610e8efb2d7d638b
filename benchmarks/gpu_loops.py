"""Parts of `python -m benchmarks.gpu`: training steps, and loops over photos."""
import contextlib
import gc
import io
import itertools
import os
import re
import subprocess
import sys
import time
import traceback

import pandas as pd
import timm
import timm.data
import timm.utils
import torch
from torch.nn import functional as F
from torch.profiler import profile

import train as train_script
from benchmarks.gpu import TRAIN, GpuUsage, record, train_flags
from core.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from core.device import autocast, configure_backend
from core.layout import read_train
from core.prediction import Normalize, torch_predictor
from core.prediction import predict as predict_photos
from dataset import CropResize, MaskDataset, create_eval_loader

CROP = (0.8, 0.95)
PREDICT_BATCH = 64
TINY = (32, 32)  # photos whose steps take a GPU less time than the host


def attempt(args, name, function, *arguments, **options):
    """Record the measures that a function returns; an error is a result, too."""
    try:
        record(args, name, **function(*arguments, **options))
    except Exception as error:
        traceback.print_exc()
        record(args, name, failed=" ".join(str(error).split())[:150])


# --- start: what the time to the second step is spent on ---

def start(args, case):
    """Run train.py on the sample up to its second step, and read the clock in between."""
    clock = [args.started]

    def mark(name):
        now = time.perf_counter()
        record(args, "sample", **{name: now - clock[0]})
        clock[0] = now

    def create_trainer(*arguments):
        mark("data_s")
        trainer = real_create_trainer(*arguments)
        mark("model_s")
        return trainer

    def train_step(trainer, batches, step, lr):
        mark(f"before_step_{step}_s")
        batches = list(batches)
        mark(f"batch_{step}_s")
        real_train_step(trainer, batches, step, lr)
        synchronize(args)
        mark(f"step_{step}_s")
        if step == 2:
            record(args, "sample", in_all_s=clock[0] - args.started)
            os._exit(0)  # the loader processes are ended with the process group

    mark("imports_s")
    real_create_trainer, real_train_step = train_script.create_trainer, train_script.train_step
    train_script.create_trainer, train_script.train_step = create_trainer, train_step
    with contextlib.redirect_stdout(sys.stderr):
        train_script.main(train_flags(args, "sample"))


# --- step: a training step on one batch in memory ---

def step(args, case):
    configure_backend(torch.device(args.device))
    small, large = args.settings.batches[0], args.settings.batches[2:]
    attempt(args, "warm-up", measure, args, 2, bare_step, size=TINY)  # loads the libraries
    if case == "ours":
        measure_all(args, our_step)
        attempt(args, "little GPU work", host_time, args, our_step)
        attempt(args, f"batch {small}", profile_step, args, small)
        measure_all(args, our_step, tuned=True)
        measure_all(args, our_step, batches=large)
    elif case == "bare":
        measure_all(args, bare_step)
        attempt(args, "little GPU work", host_time, args, bare_step)
        measure_all(args, bare_step, tuned=True)
        measure_all(args, bare_step, "contiguous", layout=torch.contiguous_format)
        measure_all(args, bare_step, "float16", precision=torch.float16)
        measure_all(args, bare_step, "float32 with TF32", precision=None)
        measure_all(args, bare_step, batches=large)
    else:
        measure_all(args, bare_step, as_graph=True)
        measure_all(args, our_step, "ours, model as graphs", model_as_graphs=True)
        measure_all(args, bare_step, tuned=True, as_graph=True)
        measure_all(args, bare_step, batches=large, as_graph=True)


def measure_all(args, create, name="", tuned=False, batches=None, **options):
    """Measure a step with batches of several sizes, with or without cudnn.benchmark."""
    torch.backends.cudnn.benchmark = tuned
    for batch in args.settings.batches[:2] if batches is None else batches:
        names = [f"batch {batch}", name, "cudnn.benchmark" if tuned else ""]
        attempt(args, ", ".join(filter(None, names)), measure, args, batch, create, **options)
    torch.backends.cudnn.benchmark = False


def compile(args, case):
    """The bare step, compiled."""
    configure_backend(torch.device(args.device))
    for mode in ("reduce-overhead", "default"):
        measure_all(args, bare_step, mode, compile_mode=mode)


def our_step(args, batch, size=None, model_as_graphs=False):
    """Return a function that does `train_step` of train.py on one batch in memory.

    `model_as_graphs` records the model's forward and backward pass as two CUDA graphs. Loss,
    clipping, optimizer and averaging are launched one by one, as before.
    """
    device, size = torch.device(args.device), size or args.settings.size
    flags = train_script.parse_args(
        train_flags(args, "sample", "--batch_size", batch, "--resize", *size))[0]
    trainer = train_script.create_trainer(flags, "none", None, device)
    images = torch.randint(256, (batch, *size, 3), dtype=torch.uint8)
    targets = torch.rand(batch, 18).softmax(dim=1)
    if device.type == "cuda":  # as the loader does
        images, targets = images.pin_memory(), targets.pin_memory()
    if model_as_graphs:
        with autocast(device, flags.amp):
            torch.set_autocast_cache_enabled(False)  # as graphs require
            inputs = trainer.normalize(images.to(device))
            torch.cuda.make_graphed_callables(trainer.model, (inputs,))
    numbers = itertools.count(1)
    return lambda: train_script.train_step(trainer, [(images, targets)], next(numbers), flags.lr)


def bare_step(args, batch, size=None, layout=torch.channels_last, precision=torch.bfloat16,
              as_graph=False, compile_mode=None):
    """Return a function that does a step of nothing but the network: the limit for every loop.

    uint8 photos to floats, forward, backward, clipping and AdamW. `precision` None is float32.
    """
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = timm.create_model(args.settings.model, num_classes=18, drop_rate=0.5)
    model.train().to(device, memory_format=layout)
    network = torch.compile(model, mode=compile_mode, dynamic=False) if compile_mode else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, capturable=as_graph)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    images = torch.randint(256, (batch, 3, *(size or args.settings.size)), dtype=torch.uint8)
    images = images.to(device, memory_format=layout)
    targets = torch.rand(batch, 18, device=device).softmax(dim=1)

    def one_step():
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            logits = network(images / 127.5 - 1)
        scaler.scale(F.cross_entropy(logits.float(), targets)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return one_step


def measure(args, batch, create, **options):
    """Return images/s of a step, the seconds of the first one, and the peak GPU memory in GiB.

    The memory that torch has reserved is what a card must have; its own libraries need more.
    """
    is_cuda = args.device == "cuda"
    if options.get("compile_mode"):
        torch.compiler.reset()  # and free the memory of the mode before
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    one_step = run = create(args, batch, **options)
    synchronize(args)
    started = time.perf_counter()
    if options.get("as_graph"):
        run = capture(one_step)
    run()
    synchronize(args)
    first = time.perf_counter() - started
    if is_cuda:
        torch.cuda.empty_cache()  # that of the first step, which may have tuned
        torch.cuda.reset_peak_memory_stats()
    images_per_s = batch / seconds_per_step(args, run)
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30,
              "reserved_gib": torch.cuda.max_memory_reserved() / 2**30} if is_cuda else {}
    return {"images_per_s": images_per_s, "first_step_s": first, **memory}


def capture(one_step):
    """Return a function that replays a step as one CUDA graph; the step must be kept, too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step()
    return graph.replay


def seconds_per_step(args, one_step, wait=True):
    """Return the mean over the steps after some warm-up, with or without waiting at the end."""
    for _ in range(1 + args.settings.steps // 5):
        one_step()
    synchronize(args)
    started = time.perf_counter()
    for _ in range(args.settings.steps):
        one_step()
    if wait:
        synchronize(args)
    return (time.perf_counter() - started) / args.settings.steps


def host_time(args, create):
    """Return the host time of one step in µs, with photos so small that the GPU is faster."""
    one_step = create(args, 2, size=TINY)
    return {"host_us_per_step": seconds_per_step(args, one_step, wait=False) * 1e6}


def profile_step(args, batch):
    """Write a profile of our step to gpu.log; return what one step calls."""
    one_step, count = our_step(args, batch), 4
    seconds_per_step(args, one_step)  # warm-up
    with profile() as profiler:
        for _ in range(count):
            one_step()
    events = profiler.key_averages()
    print(events.table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    return {f"{name}_per_step": sum(event.count for event in events if name in event.key) / count
            for name in ("aten::", "LaunchKernel", "cudaMemcpy", "Synchronize")}


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


# --- train: whole loops ---

def timm_training(args, case):
    """timm's loader and a loop as in its train.py, in mixed precision and with averaging."""
    s, device = args.settings, torch.device(args.device)
    batch, workers = map(int, case.split()[1:])
    torch.backends.cudnn.benchmark = True
    loader = timm.data.create_loader(
        timm_dataset(args), (3, *s.size), batch, is_training=True, num_workers=workers,
        scale=(0.7, 1.0), re_prob=0.25, color_jitter=(0.2, 0.2, 0.0), color_jitter_prob=0.5,
        device=device)
    model = timm.create_model(s.model, num_classes=18)
    model.train().to(device, memory_format=torch.channels_last)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05)
    average, done, started = timm.utils.ModelEmaV3(model, decay=0.999), 0, time.perf_counter()
    while True:
        for images, labels in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            average.update(model, done)
            if done % s.interval == 0:
                value, now = loss.item(), time.perf_counter()
                print(f"step {done}  loss {value:.4f}  "
                      f"{s.interval * batch / (now - started):.1f} images/s", flush=True)
                started = now


def timm_dataset(args, count=None, repeat=1):
    data = timm.data.ImageDataset(f"{args.work}/data/train/images",
                                  target_transform=lambda target: target % 18)
    data.reader.samples = data.reader.samples[:count] * repeat
    return data


def sample(args, case):
    """Time the whole command; the other case is in this process, with the other setting."""
    flags, output, started = train_flags(args, "sample"), io.StringIO(), args.started
    with GpuUsage() as usage:
        if case == "train.py":
            started = time.perf_counter()
            output.write(subprocess.check_output([*TRAIN, *flags], text=True))
        else:
            def switched(*arguments):
                configure_backend(*arguments)
                torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
            train_script.configure_backend = switched
            with contextlib.redirect_stdout(output):
                train_script.main(flags)
    score = re.search(r"best macro F1 ([\d.]+)", output.getvalue())[1]
    record(args, "from command to result", seconds=time.perf_counter() - started, macro_f1=score,
           **usage.measures)


def predict(args, case):
    """The loop of inference.py, and timm's; each in both memory formats or precisions.

    A loop's time includes the start of its loader processes.
    """
    s, device = args.settings, torch.device(args.device)
    configure_backend(device)
    photos = read_train(f"{args.work}/data").iloc[:s.predicted]
    photos = pd.concat([photos] * s.repeat, ignore_index=True)
    workers = int(case.split()[0])
    images = torch.randint(256, (PREDICT_BATCH, *s.size, 3), dtype=torch.uint8, device=device)
    model = timm.create_model(s.model, num_classes=18).to(device).eval()
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD).to(device)

    def ours(table):
        data = MaskDataset(table, CropResize(s.size, CROP))
        loader = create_eval_loader(data, PREDICT_BATCH, workers, device)
        predict_photos([(predictor, "none")], loader, device)

    def timms(table):
        data = timm_dataset(args, min(len(table), s.predicted), -(-len(table) // s.predicted))
        loader = timm.data.create_loader(data, (3, *s.size), PREDICT_BATCH, num_workers=workers,
                                         crop_pct=0.95, device=device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            for batch, _ in loader:
                model(batch).softmax(-1).cpu()

    def timed(loop):
        loop(photos[:PREDICT_BATCH])  # warm-up
        started = time.perf_counter()
        with GpuUsage() as usage:
            loop(photos)
            seconds = time.perf_counter() - started
        return {"images_per_s": len(photos) / seconds, **usage.measures}

    for is_half in (False, True):
        attempt(args, f"timm, {'bfloat16' if is_half else 'float32'}", timed, timms)
    for name in ("channels_last", "contiguous_format"):
        layout = getattr(torch, name)
        model.to(memory_format=layout)
        predictor = torch_predictor(
            model, lambda batch, layout=layout: normalize(batch).contiguous(memory_format=layout))
        attempt(args, f"ours, {name}", timed, ours)
        with torch.inference_mode():
            per_batch = seconds_per_step(args, lambda predictor=predictor: predictor(images))
        record(args, f"in memory, {name}", images_per_s=PREDICT_BATCH / per_batch)
