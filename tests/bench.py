"""`make bench`: the cost of the methods and of the plumbing, as ratios measured side by side in one process.

Each row times two things in turn, several times, and gives the median of the ratios with their range: the machine's load
and clock affect both. Some rows: python tests/bench.py NAME ... (the keys of BENCHES, or parts of them); with --json each row
is one line of JSON instead. The rows of "accelerator memory" are computed, not measured.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import bismap
import c2f
import cag
import fada
import sim
from common import data, metrics
from common.cli import Size
from common.deeplab import build_model, upsample
from common.run import Run

LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]       # of the 19 classes


def timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def row(name: str, goal: str, ratios: list[float], note: str = "") -> None:
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    if "--json" in sys.argv:
        print(json.dumps({"what": name, "median": median, "low": low, "high": high, "goal": goal, "note": note,
                          "torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    else:
        print(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {goal} | {note} |", flush=True)


def interleaved(first, second, repetitions: int) -> tuple[list[float], float, float]:
    """(ratios first / second, median seconds of each), after one warm-up of both."""
    first(), second()
    pairs = [(timed(first), timed(second)) for _ in range(repetitions)]
    return [a / b for a, b in pairs], *(statistics.median(times) for times in zip(*pairs, strict=True))


class StepRun:
    """Stands in for a Run: hands the same batches to a script's stage and times each pass through its loop body,
    in turn with a bare step of a copy of the network on the same batches."""

    device = torch.device("cpu")
    options = types.SimpleNamespace(seed=0)
    rank, classes = 0, data.class_list("gta5")
    item_seeds = Run.item_seeds

    def __init__(self, bare, *batches):
        self.bare, self.batches, self.pairs = bare, batches, []

    def stage(self, name, iterations, state, *datasets, batch_size, note=None):
        for it in range(6):
            bare = timed(self.bare)
            begin = time.perf_counter()
            yield it, *self.batches
            if it:                                               # the first is the warm-up
                self.pairs.append((time.perf_counter() - begin, bare))

    def seed(self, *names):
        torch.manual_seed(0)

    def place(self, module):
        return module

    def autocast(self):
        return contextlib.nullcontext()

    def report(self, **losses):
        pass

    def row(self, name: str, goal: str) -> None:
        row(name, goal, [a / b for a, b in self.pairs], f"bare {statistics.median(b for _, b in self.pairs):.2f} s")


class PassRun:
    """Stands in for a Run in a pass over images."""

    device = float64_device = torch.device("cpu")
    options = types.SimpleNamespace(seed=0)
    classes = data.class_list("gta5")
    autocast = staticmethod(contextlib.nullcontext)

    def __init__(self, images):
        self.images = images

    def sweep(self, what, dataset, shared=True):
        yield from self.images


class RandomImages:
    """Images and labels of 64x32, made again at each pass."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for k in range(self.count):
            yield torch.randn(1, 3, 32, 64), torch.randint(0, 19, (1, 32, 64)), (f"{k}",)


def peak_memory(pass_: str, count: int) -> int:
    """Peak memory in KiB of a process that only does one offline pass over `count` images."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (pass_, count))


@torch.no_grad()
def _peak_memory(pass_: str, count: int) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = PassRun(RandomImages(count))
    model = build_model("v2" if pass_ == "sim" else "v3+", "resnet18", 19, "none", "all").eval()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(None):
        folder = Path(name)
        if pass_ == "cag":
            cag.label_target(run, cag.Config(), model, cag.source_anchors(run, model, None).nan_to_num(), None, folder)
        elif pass_ == "c2f":
            c2f.label_target(run, c2f.Config(), model, None, folder)
        elif pass_ == "sim":
            sim.write_pseudo_labels(run, sim.Config(), model, None, folder)
        elif pass_ == "bismap sample":                               # full long before the hundredth image
            bismap.fit_prototypes(run, bismap.Config(samples=500, components=2, em_iterations=2), model, None)
        else:
            gmms = bismap.Gmm(torch.full((19, 2), 0.5), torch.randn(19, 2, 256), torch.ones(19, 2, 256))
            bismap.label_target(run, bismap.Config(delta=-300.0), model, gmms, torch.randn(19, 256), None, folder / "labels")
            cfg = bismap.Config(stm_backbone="warmup")
            encoder = bismap.independent_encoder(run, cfg, model)
            bismap.write_transferability(run, cfg, encoder, torch.randn(40, 512), 1.0, torch.rand(19), None, folder / "w")
    # Of this process alone: getrusage's maximum begins at the parent's.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def pass_memory(pass_: str, what: str) -> None:
    few, many = (peak_memory(pass_, count) for count in (100, 1000))
    row(f"{what}: peak memory with 1,000 images / with 100", "1", [many / few],
        f"{many / 1024:.0f} MiB against {few / 1024:.0f} MiB")


def accelerator_memory() -> None:
    """Memory of an iteration at the paper's sizes, for its backward pass, counted on tensors without contents (ResNet-101)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    small, large, crop = (512, 1024), (720, 1280), (640, 1280)
    for name, network, freeze, batch, images in [
            ("FADA, 4 + 4 images of 1280x720 and 1024x512", "v2", "encoder", 4, [large, small]),
            ("CAG, 1 + 1 crops of 1280x640", "v3+", "all", 1, [crop, crop]),
            ("C2F, 4 + 4 + 4 crops of 1280x640", "v3+", "all", 4, [crop] * 3),
            ("SIM, 1 + 1 images of 1280x720 and 1024x512", "v2", "encoder", 1, [large, small]),
            ("BiSMAP's warm-up, 8 crops of 896x512", "v3+", "encoder", 8, [(512, 896)]),
            ("BiSMAP's self-training, 4 + 4 crops of 896x512", "v3+", "encoder", 4, [(512, 896)] * 2)]:
        gib = []
        for bf16 in (True, False):
            storages: dict[int, torch.UntypedStorage] = {}

            def pack(x, storages=storages):
                storages[x.untyped_storage()._cdata] = x.untyped_storage()
                return x

            with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                model = build_model(network, "resnet101", 19, "none", freeze)
                losses = []
                for size in images:
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        _, logits = model(torch.empty(batch, 3, *size))
                    label = torch.zeros(batch, *size, dtype=torch.long)
                    losses.append(torch.nn.functional.cross_entropy(upsample(logits.float(), size), label))
                weights = 4 * sum(p.numel() for p in model.parameters())
            total = sum(storage.nbytes() for storage in storages.values())
            gib.append((total + 3 * weights) / 2**30)                  # with weights' gradients and momentum
        row(f"accelerator memory, computed: {name}; bf16 / float32", "", [gib[0] / gib[1]],
            f"{gib[0]:.1f} GiB against {gib[1]:.1f} GiB")


def network_step(network: str, images: list[torch.Tensor], freeze_bn: str = "encoder", layout=torch.preserve_format):
    """(model, a function that does one forward, backward and update of a copy of it on `images`)."""
    torch.manual_seed(0)
    model, copy = (build_model(network, "resnet101", 19, "none", freeze_bn).to(memory_format=layout) for _ in range(2))
    optimizer = torch.optim.SGD(copy.parameter_groups(1e-6), momentum=0.9, weight_decay=1e-4)

    def bare():
        loss = sum(copy(x)[1].mean() for x in images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, bare


def fada_step() -> None:
    x_s, x_t = torch.randn(2, 2, 3, 128, 256).unbind()
    y = torch.randint(0, 19, (2, 128, 256))
    model, bare = network_step("v2", [x_s, x_t])
    run = StepRun(bare, (x_s, y), (x_t, y))
    fada.adversarial(run, fada.Config(lr=1e-6), model, None, None)
    run.row("FADA: adversarial step / bare step (ResNet-101, 2 + 2 images of 256x128)", "at most 1.13")


def cag_step() -> None:
    x_s, x_t = torch.randn(2, 1, 3, 256, 512).unbind()
    y_s, y_t, y_p = torch.randint(0, 19, (3, 1, 256, 512)).unbind()
    model, bare = network_step("v3+", [x_s, x_t], "all")
    run = StepRun(bare, (x_s, y_s), (x_t, y_s, y_t, y_p))
    cag.train_stage(run, cag.Config(lr=1e-6), 1, model, torch.randn(19, 256), None, None, 1)
    run.row("CAG: stage's step / bare step (ResNet-101, 1 + 1 images of 512x256)", "at most 1.10")


def cag_distances() -> None:
    feat, anchors = torch.randn(1, 256, 256, 512), torch.randn(19, 256)

    def cdist():
        return torch.cdist(feat.flatten(2).transpose(1, 2), anchors[None]).sort(dim=-1)

    ratios, theirs, ours = interleaved(cdist, lambda: cag.nearest_anchor(cag.anchor_distances(feat, anchors)), 7)
    row("CAG: seconds of torch.cdist and sort / Eqs. (5) and (6) (stride 4 of 2048x1024, 256 channels, 19 anchors)", "above 1",
        ratios, f"{theirs:.3f} s against {ours:.3f} s")


@torch.no_grad()
def cag_passes() -> None:
    torch.manual_seed(0)
    model = build_model("v3+", "resnet101", 19, "none", "all").eval()
    images = [(torch.randn(1, 3, 512, 1024), torch.randint(0, 19, (1, 512, 1024)), (f"{k}",)) for k in range(2)]
    run, anchors = PassRun(images), torch.randn(19, 256)

    def plain():
        for x, _, _ in images:
            model(x)

    with tempfile.TemporaryDirectory() as folder:
        passes = {"anchor": lambda: cag.source_anchors(run, model, None),
                  "pseudo-label": lambda: cag.label_target(run, cag.Config(), model, anchors, None, Path(folder))}
        for name, function in passes.items():
            ratios, _, bare = interleaved(function, plain, 3)
            row(f"CAG: {name} pass / plain inference (ResNet-101, images of 1024x512)", "at most 1.20", ratios,
                f"inference {bare / len(images):.2f} s per image")


def c2f_step() -> None:
    x_s, x_t = torch.randn(2, 1, 3, 256, 512).unbind()
    y_s, y_t = torch.randint(0, 19, (2, 1, 256, 512)).unbind()
    model, bare = network_step("v3+", [x_s, x_t, x_t], "all")
    run = StepRun(bare, (x_s, y_s), (x_t, y_s, y_t))
    centers = c2f.category_centers(torch.randn(19, 256), torch.ones(19))
    c2f.train_step(run, c2f.Config(step_lr=1e-6), 1, model, centers, None, None)
    run.row("C2F: a step's iteration / bare step (ResNet-101, 1 + 1 + 1 images of 512x256)", "at most 1.10")


def sim_step() -> None:
    x_s, x_t = torch.randn(2, 1, 3, 256, 512).unbind()
    y_s = torch.randint(0, 19, (1, 16, 32)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    model, bare = network_step("v2", [x_s, x_t])
    run, cfg = StepRun(bare, (x_s, y_s), (x_t, y_s)), sim.Config(lr=1e-6)
    sim.train_step(run, cfg, 1, model, *sim.make_banks(run, cfg, model.feat_channels), None, None)
    run.row("SIM: step 1's iteration / bare step (ResNet-101, 1 + 1 images of 512x256; D included)", "at most 1.25")


def sim_matching() -> None:
    """The grid of a 1024x512 image: 8 stuff classes, 60 regions of thing classes, full banks."""
    torch.manual_seed(0)
    feat = torch.randn(1, 2048, 65, 129, requires_grad=True)
    stuff, things = sim.make_banks(PassRun([]), sim.Config(), 2048)
    label_map = torch.tensor(stuff.classes)[torch.arange(65) * 8 // 65][:, None].repeat(1, 129)[None]
    for r in range(60):
        y, x = 2 + r // 12 * 12, 2 + r % 12 * 10
        label_map[0, y:y + 5, x:x + 4] = things.classes[r % 6]
    for bank in (stuff, things):
        bank.features.normal_()
        bank.written.fill_(bank.slots)

    def ours():
        (sim.stuff_loss(feat, label_map, stuff) + sim.instance_loss(feat, label_map, things)).backward()

    def plain():
        loss = 0
        for k in label_map.unique().tolist():
            mask = label_map[0] == k
            regions, bank = ([mask], stuff) if k in stuff.classes else (sim.connected_regions(label_map[0], k), things)
            part = [((feat[0] * r).sum(dim=(1, 2)) / r.sum() - bank.samples(k)).abs().mean(dim=1).min() for r in regions]
            loss = loss + sum(part) / len(part)
        loss.backward()

    ratios, loop, one_pass = interleaved(plain, ours, 5)
    row("SIM: seconds of a loop over the masks / the matching losses (1024x512 image, 60 regions, with backward pass)",
        "at least 5", ratios, f"{loop:.2f} s against {one_pass:.3f} s")


def c2f_alignment() -> None:
    from skimage import color, exposure
    with tempfile.TemporaryDirectory() as folder:
        images = [data.read_image(pair.image) for pair in gta5_files(Path(folder), 2)]

    def theirs(source, reference):
        lab, lab_n = (color.rgb2lab(x.permute(1, 2, 0).numpy()) for x in (source, reference))
        color.lab2rgb(exposure.match_histograms(lab, lab_n, channel_axis=-1))

    for coarse in (1, 4):                                            # every level, every fourth
        pair = [(image // coarse * coarse).float() / 255 for image in images]
        colors = c2f.distinct_colors(pair[0])[0].shape[2]
        ratios, theirs_s, ours_s = interleaved(lambda pair=pair: theirs(*pair),
                                               lambda pair=pair: c2f.photometric_align(*pair), 5)
        row("C2F: seconds of scikit-image (rgb2lab, match_histograms, lab2rgb) / photometric_align, exact (1914x1052, "
            f"{colors:,} colours)", "above 2", ratios, f"{theirs_s:.2f} s against {ours_s:.2f} s")


def bismap_mixtures() -> None:
    from sklearn.mixture import GaussianMixture
    torch.manual_seed(0)
    feat = (torch.randn(100_000, 256) + 3 * torch.randn(8, 256)[torch.randint(8, (100_000,))]).double()
    start = bismap.Gmm(torch.full((8,), 1 / 8).double(), feat[:8].clone(), torch.ones(8, 256).double())

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                          # it warns that ten iterations did not converge
            GaussianMixture(8, covariance_type="diag", max_iter=10, tol=0, weights_init=start.weight.numpy(),
                            means_init=start.mean.numpy(), precisions_init=1 / start.variance.numpy()).fit(feat.numpy())

    ratios, theirs_s, ours_s = interleaved(theirs, lambda: bismap.fit_gmm(feat, 8, 10, tol=-1e9, init=start), 3)
    row("BiSMAP: seconds of scikit-learn's GaussianMixture / fit_gmm (float64, 8 of 100,000 x 256, equal starts, 10 steps)",
        "at least 1", ratios, f"{theirs_s:.2f} s against {ours_s:.2f} s")


@torch.no_grad()
def bismap_scoring() -> None:
    torch.manual_seed(0)
    model, x = build_model("v3+", "resnet101", 19, "none", "all").eval(), torch.randn(1, 3, 512, 1024)
    gmms, (feat, _) = bismap.Gmm(torch.full((19, 8), 1 / 8), torch.randn(19, 8, 256), torch.ones(19, 8, 256)), model(x)
    ratios, scoring, inference = interleaved(lambda: bismap.class_scores(feat, gmms), lambda: model(x), 3)
    row("BiSMAP: scoring an image at stride 4 for 19 classes / its inference (ResNet-101, 1024x512)", "at most 0.5", ratios,
        f"{scoring:.2f} s against {inference:.2f} s")


def bismap_step() -> None:
    x_s, x_t = torch.randn(2, 1, 3, 256, 512).unbind()
    y_s, y_t, w = torch.randint(0, 19, (3, 1, 256, 512)).unbind()
    model, step = network_step("v3+", [x_s, x_t], "all")

    def bare():                                                      # with the teacher's inference
        step()
        with torch.no_grad():
            model(x_t)
    run = StepRun(bare, (x_s, y_s, w), (x_t, y_s, y_t))
    bismap.self_train(run, bismap.Config(adapt_lr=1e-6), model, None, None)
    run.row("BiSMAP: self-training's iteration / bare steps (ResNet-101, 1 + 1 images of 512x256)", "at most 1.15")


def gta5_files(root: Path, count: int) -> list[data.Pair]:
    """Files of GTA5's size and kind; the image is smooth noise, so that decoding costs what a photograph costs."""
    rng, pairs = np.random.default_rng(0), []
    palette = np.zeros((256, 3), np.uint8)
    palette[LABEL_IDS] = data.class_list("gta5").colors
    for k in range(count):
        small = Image.fromarray(rng.integers(0, 256, (105, 191, 3), dtype=np.uint8)).resize((1914, 1052), Image.BICUBIC)
        noisy = np.clip(np.asarray(small, dtype=np.int16) + rng.integers(-6, 7, (1052, 1914, 3)), 0, 255).astype(np.uint8)
        blocks = rng.choice([7, 8, 11, 21, 23, 26], (66, 120)).astype(np.uint8)
        label = Image.fromarray(blocks).resize((1914, 1052), Image.NEAREST)
        label.putpalette(palette.tobytes())
        Image.fromarray(noisy).save(root / f"{k}.png")
        label.save(root / f"{k}_label.png")
        pairs.append(data.Pair(root / f"{k}.png", root / f"{k}_label.png", str(k)))
    return pairs


def pillow_item(pair: data.Pair, ids: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An item of a usual loader: Pillow, NumPy, one comparison per class."""
    image = Image.open(pair.image).convert("RGB").resize((1280, 720), Image.BILINEAR)
    ids_map = np.asarray(Image.open(pair.label).resize((1280, 720), Image.NEAREST), dtype=np.float32)
    label = np.full(ids_map.shape, 255, dtype=np.float32)
    for file_id, index in ids.items():
        label[ids_map == file_id] = index
    image = (np.asarray(image, dtype=np.float32) / 255 - data.IMAGENET_MEAN) / data.IMAGENET_STD
    return image.transpose(2, 0, 1).copy(), label


def loading() -> None:
    """Resized and cropped items from files of GTA5's size: their cost beside decoding, and what jitter and alignment add."""
    with tempfile.TemporaryDirectory() as folder:
        pairs, classes = gta5_files(Path(folder), 4), data.class_list("gta5")
        for name, scale, crop in (("CAG and C2F", (1.0, 1.5), Size(1280, 640)), ("BiSMAP", (0.5, 1.5), Size(896, 512))):
            align = c2f.Alignment(c2f.Config(), [pair.image for pair in pairs], None)

            def items(jitter=0.0, transform=None, scale=scale, crop=crop):
                augment = data.Augment(scale=scale, crop=crop, jitter=jitter)
                dataset = data.SegmentationDataset(pairs, "gta5", classes, None, augment, transform=transform)
                return lambda: [dataset[k % 4, k] for k in range(8)]
            def decode():
                for k in range(8):
                    data.read_image(pairs[k % 4].image), data.read_label(pairs[k % 4].label, "gta5", classes)
            torch.set_num_threads(1)
            for what, goal, more, less in (("item / its image and label decoded", "", items(), decode),
                                           ("item with jitter / without", "at most 1.40", items(0.5), items()),
                                           ("item with alignment / without", "at most 1.60", items(0.0, align), items()),
                                           ("item with both / without", "", items(0.5, align), items())):
                ratios, with_s, without_s = interleaved(more, less, 5)
                row(f"loader: {name}, {what} (GTA5, x{scale[0]}-{scale[1]}, crop {crop}, one process)", goal, ratios,
                    f"{125 * with_s:.0f} ms against {125 * without_s:.0f} ms")


def precision() -> None:
    """The bare step of ResNet-101 v3+ on two images of 512x256, in other formats than contiguous float32."""
    x = torch.randn(2, 3, 256, 512)
    model, plain = network_step("v3+", [x])
    _, channels_last = network_step("v3+", [x.to(memory_format=torch.channels_last)], layout=torch.channels_last)

    def bf16():
        with torch.autocast("cpu", torch.bfloat16):
            plain()
    for name, step in (("channels_last", channels_last), ("bf16", bf16)):
        ratios, seconds, plain_s = interleaved(step, plain, 3)
        row(f"network step (ResNet-101 v3+, 2 images of 512x256) with {name} / without", "", ratios,
            f"{seconds:.2f} s against {plain_s:.2f} s")


def loader() -> None:
    ids = {file_id: index for index, file_id in enumerate(LABEL_IDS)}
    with tempfile.TemporaryDirectory() as folder:
        pairs = gta5_files(Path(folder), 4)
        dataset = data.SegmentationDataset(pairs, "gta5", data.class_list("gta5"), Size(1280, 720), data.Augment(flip=True))
        ratios, plain, ours = interleaved(lambda: [pillow_item(pair, ids) for pair in pairs],
                                          lambda: [dataset[k, k] for k in range(len(pairs))], 5)
        row("loader: images per second / plain Pillow loop's (GTA5 at 1280x720, one process)", "above 1", ratios,
            f"{4 / ours:.1f} against {4 / plain:.1f} images/s")


def evaluation() -> None:
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
    rng = np.random.default_rng(0)
    classes = data.class_list("gta5")
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / f"x_{kind}.png" for kind in ("gtFine_labelIds", "pred")]
        for name in names:
            small = Image.fromarray(rng.choice(LABEL_IDS, (128, 256)).astype(np.uint8))
            small.resize((2048, 1024), Image.NEAREST).save(name)

        def ours():
            label, prediction = (data.read_label(name, "cityscapes", classes) for name in names)
            return metrics.confusion_matrix(prediction, label, 19)

        def theirs():
            args = official.args
            args.evalInstLevelScore, args.quiet = False, True
            matrix = official.generateMatrix(args)
            official.evaluatePair(str(names[1]), str(names[0]), matrix, official.generateInstanceStats(args), {}, args)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)                                     # as theirs, and as a loader's process
        ratios, theirs_s, ours_s = interleaved(theirs, ours, 15)
        torch.set_num_threads(threads)
        row("evaluation: seconds of cityscapesscripts / ours (reading and counting 2048x1024 pixels, one thread)", "at least 1",
            ratios, f"{theirs_s:.3f} s against {ours_s:.3f} s")


MEMORY = {"cag": "CAG's anchors and labels", "c2f": "C2F's labels and thresholds", "sim": "SIM's thresholds and labels",
          "bismap sample": "BiSMAP's sample of source features", "bismap maps": "BiSMAP's labels and transferability maps"}
BENCHES = {"fada": fada_step, "cag step": cag_step, "cag distances": cag_distances, "cag passes": cag_passes,
           "c2f step": c2f_step, "c2f alignment": c2f_alignment, "sim step": sim_step, "sim matching": sim_matching,
           "bismap mixtures": bismap_mixtures, "bismap scoring": bismap_scoring, "bismap step": bismap_step,
           "loader": loader, "loading": loading, "evaluation": evaluation, "precision": precision,
           **{f"{name} memory": partial(pass_memory, name, what) for name, what in MEMORY.items()},
           "accelerator": accelerator_memory}

if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    wanted = [word for word in sys.argv[1:] if word != "--json"]
    if "--json" not in sys.argv:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
        print("| what | median ratio | range | goal | |\n|---|---|---|---|---|")
    for name, bench in BENCHES.items():
        if not wanted or any(part in name for part in wanted):
            bench()
