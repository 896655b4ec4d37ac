#!/usr/bin/env python3
"""Times pi0 at the published sizes in plain PyTorch, the peer of the engine on the same card. Random bf16 weights.

usage: gpu_torch_pi0.py [--seconds N] [--batch 1,8] [--compile]      on a card: eager and CUDA graph, or torch.compile and CUDA graph
       gpu_torch_pi0.py --check GOLDEN_DIR [--compile]               on a CPU, tiny: the network equals the recorded openpi

The network is openpi's, written for speed where that changes no result: q, k, v in one product, gate and up in one product, key-value
buffers that are written in place, no last prefix layer after its k and v. All prompts are full, so the prefix needs no mask. RoPE
frequencies are exact. Prints one JSON object per line: milliseconds of a chunk by CUDA events, by the host's clock with upload and download.
"""

import argparse
import json
import math
import pathlib
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = "cuda"
RUNS = 100
WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    vocab: int = 257152
    vlm_width: int = 2048
    vlm_mlp: int = 16384
    expert_width: int = 1024
    expert_mlp: int = 4096
    depth: int = 18
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_depth: int = 27
    vision_heads: int = 16
    image: int = 224
    patch: int = 14
    cameras: int = 3
    prompt: int = 48
    horizon: int = 50
    action_dim: int = 32

    @property
    def prefix(self):
        return self.cameras * (self.image // self.patch) ** 2 + self.prompt

    @property
    def suffix(self):
        return self.horizon + 1


# Attention with a bias (0 or a large negative number, [batch, 1, rows, keys]). `fold` makes the bias of a variant once, before the steps.

def sdpa(q, k, v, bias):
    """PyTorch's attention; without a bias it shares the key-value head, with a bias the heads are expanded for the kernel that takes one."""
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    heads = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(heads, 1) if k.shape[1] > 1 else k.expand(-1, heads, -1, -1),
        v.repeat_interleave(heads, 1) if v.shape[1] > 1 else v.expand(-1, heads, -1, -1), attn_mask=bias)


def folded(q, k, v, bias):
    """The heads of the only key-value head become rows."""
    b, h, s, d = q.shape
    return F.scaled_dot_product_attention(q.reshape(b, 1, h * s, d), k, v, attn_mask=bias).view(b, h, s, d)


def products(q, k, v, bias):
    """Two batched products and a softmax."""
    b, h, s, d = q.shape
    scores = torch.baddbmm(bias[:, 0], q.reshape(b, h * s, d), k[:, 0].transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(torch.softmax(scores, -1), v[:, 0]).view(b, h, s, d)


VARIANTS = {"sdpa": sdpa, "folded": folded, "products": products}


def fold(variant, bias, heads):
    """Returns the bias for a variant, with rows of a multiple of 8 elements in memory, as the kernels need it."""
    bias = bias if variant is sdpa else bias.repeat(1, 1, heads, 1)
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys]


class RmsNorm(nn.Module):
    """Gemma's norm; `gain` is 1 + the checkpoint's weight."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.gain.shape, self.gain, 1e-6)


class GemmaLayer(nn.Module):
    def __init__(self, width, mlp, sizes):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def project(self, x, rope):
        """Returns q, k, v as [batch, heads, rows, head_dim], q and k rotated."""
        b, s, _ = x.shape
        x = self.qkv(self.norm1(x)).view(b, s, -1, self.head_dim)
        qk, v = x.split((self.heads + self.kv_heads, self.kv_heads), 2)
        cos, sin = rope
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin).transpose(1, 2)
        return qk[:, :self.heads], qk[:, self.heads:], v.transpose(1, 2)

    def finish(self, x, attended):
        b, h, s, d = attended.shape
        x = x + self.o(attended.transpose(1, 2).reshape(b, s, h * d))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.gelu(gate, approximate="tanh") * up)

    def forward(self, x, rope, keys, values, start, bias, attend, last):
        """Writes k and v to rows `start`.. of the buffers; attends to all rows up to there."""
        q, k, v = self.project(x, rope)
        end = start + x.shape[1]
        keys[:, :, start:end].copy_(k)
        values[:, :, start:end].copy_(v)
        return x if last else self.finish(x, attend(q, keys[:, :, :end], values[:, :, :end], bias))


class VisionLayer(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes.vision_width
        self.heads = sizes.vision_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, sizes.vision_mlp), nn.Linear(sizes.vision_mlp, width)

    def forward(self, x):
        b, s, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Pi0(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        tokens = (sizes.image // sizes.patch) ** 2
        self.patches = nn.Conv2d(3, sizes.vision_width, sizes.patch, sizes.patch)
        self.positions = nn.Parameter(torch.empty(tokens, sizes.vision_width))
        self.vision = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.vision_depth))
        self.vision_norm = nn.LayerNorm(sizes.vision_width, 1e-6)
        self.projector = nn.Linear(sizes.vision_width, sizes.vlm_width)
        self.embedding = nn.Parameter(torch.empty(sizes.vocab, sizes.vlm_width))
        self.vlm = nn.ModuleList(GemmaLayer(sizes.vlm_width, sizes.vlm_mlp, sizes) for _ in range(sizes.depth))
        self.expert = nn.ModuleList(GemmaLayer(sizes.expert_width, sizes.expert_mlp, sizes) for _ in range(sizes.depth))
        self.expert_norm = RmsNorm(sizes.expert_width)
        self.state_in = nn.Linear(sizes.action_dim, sizes.expert_width)
        self.action_in = nn.Linear(sizes.action_dim, sizes.expert_width)
        self.time_in = nn.Linear(2 * sizes.expert_width, sizes.expert_width)
        self.time_out = nn.Linear(sizes.expert_width, sizes.expert_width)
        self.action_out = nn.Linear(sizes.expert_width, sizes.action_dim)

    @torch.no_grad()
    def randomize(self):
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
            elif name.endswith(("gain", "norm.weight", "norm1.weight", "norm2.weight")):
                weight.normal_(1, 0.1)
            else:
                weight.normal_(0, 0.02)
        return self

    def embed_images(self, images):
        """images: [batch, cameras, side, side, 3] u8 -> [batch, cameras * tokens, width]"""
        b = images.shape[0]
        x = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.positions.dtype) / 127.5 - 1.0
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.vision:
            x = layer(x)
        return self.projector(self.vision_norm(x)).reshape(b, -1, self.sizes.vlm_width)

    def embed_prefix(self, images, prompt):
        text = F.embedding(prompt, self.embedding) * self.sizes.vlm_width**0.5
        return torch.cat((self.embed_images(images), text), 1)

    def embed_suffix(self, x, state, moment):
        """x: [batch, horizon, action_dim] f32, moment: [width], the embedded flow time"""
        actions = self.action_in(x.to(state.dtype))
        both = torch.cat((actions, moment.expand_as(actions)), -1)
        return torch.cat((self.state_in(state)[:, None], self.time_out(F.silu(self.time_in(both)))), 1)

    def velocity_of(self, hidden):
        return self.action_out(self.expert_norm(hidden)[:, -self.sizes.horizon:]).float()


def time_embedding(t, width, like):
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
    angle = t[:, None].double() * 2 * math.pi / period
    return torch.cat((angle.sin(), angle.cos()), -1).to(like)


def rope_table(positions, head_dim, like):
    """positions: [batch, rows] -> cosines and signed sines [batch, rows, 1, head_dim], so that x * cos + roll(x) * sin rotates."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (positions.cpu()[..., None] * frequency)[:, :, None]
    return torch.cat((angle.cos(), angle.cos()), -1).to(like), torch.cat((-angle.sin(), angle.sin()), -1).to(like)


def bias_of(allowed, like):
    """allowed: [batch, rows, keys] bool"""
    return torch.zeros_like(allowed[:, None], dtype=like.dtype, device=like.device).masked_fill(~allowed[:, None].to(like.device), -3e38)


class Chunk:
    """Buffers of one batch size and one number of denoise steps, and the computation of a chunk in them."""

    def __init__(self, net, batch, steps, attend=sdpa, valid=None):
        sizes, like = net.sizes, net.positions
        self.net, self.steps, self.attend = net, steps, attend

        def zeros(*shape, dtype=like.dtype):
            return torch.zeros(shape, dtype=dtype, device=like.device)
        self.images = zeros(batch, sizes.cameras, sizes.image, sizes.image, 3, dtype=torch.uint8)
        self.prompt = zeros(batch, sizes.prompt, dtype=torch.int64)
        self.state = zeros(batch, sizes.action_dim)
        self.noise = zeros(batch, sizes.horizon, sizes.action_dim, dtype=torch.float32)
        self.actions = torch.zeros_like(self.noise)
        rows = sizes.prefix + sizes.suffix
        self.keys, self.values = (zeros(sizes.depth, batch, sizes.kv_heads, rows, sizes.head_dim) for _ in range(2))
        # t runs from 1 (noise) to 0 (actions)
        times = 1.0 - torch.arange(steps, dtype=torch.float64) / steps
        self.moments = time_embedding(times, sizes.expert_width, like)
        everything = torch.ones(batch, sizes.prefix, dtype=torch.bool)
        padded = valid is not None
        valid = valid.cpu() if padded else everything
        first = torch.cumsum(valid, 1) - 1
        then = valid.sum(1, keepdim=True) + torch.arange(sizes.suffix)[None]
        self.rope_prefix, self.rope_suffix = (rope_table(p, sizes.head_dim, like) for p in (first, then))
        # the state sees itself and the prefix; the actions see everything
        own = torch.ones(sizes.suffix, sizes.suffix, dtype=torch.bool)
        own[0, 1:] = False
        self.seen_prefix = valid[:, None, :].expand(-1, sizes.prefix, -1)
        self.seen_suffix = torch.cat((valid[:, None, :].expand(-1, sizes.suffix, -1), own.expand(batch, -1, -1)), -1)
        self.bias_prefix = bias_of(self.seen_prefix, like) if padded else None
        self.bias_suffix = fold(attend, bias_of(self.seen_suffix, like), sizes.heads)

    def prefix(self):
        x = self.net.embed_prefix(self.images, self.prompt)
        last = len(self.net.vlm) - 1
        for i, layer in enumerate(self.net.vlm):
            x = layer(x, self.rope_prefix, self.keys[i], self.values[i], 0, self.bias_prefix, sdpa, i == last)

    def velocity(self, x, step):
        h = self.net.embed_suffix(x, self.state, self.moments[step])
        start = self.net.sizes.prefix
        for i, layer in enumerate(self.net.expert):
            h = layer(h, self.rope_suffix, self.keys[i], self.values[i], start, self.bias_suffix, self.attend, False)
        return self.net.velocity_of(h)

    def denoise(self):
        x = self.noise
        for step in range(self.steps):
            x = x - self.velocity(x, step) / self.steps
        self.actions.copy_(x)

    def joint_velocity(self, x, step):
        """The same velocity without key-value buffers: both stacks in one pass over all rows. For the check."""
        net, n = self.net, self.net.sizes.prefix
        p, s = net.embed_prefix(self.images, self.prompt), net.embed_suffix(x, self.state, self.moments[step])
        blind = torch.zeros(p.shape[0], n, s.shape[1], dtype=torch.bool)
        bias = bias_of(torch.cat((torch.cat((self.seen_prefix, blind), 2), self.seen_suffix), 1), p)
        for vlm, expert in zip(net.vlm, net.expert):
            a, b = vlm.project(p, self.rope_prefix), expert.project(s, self.rope_suffix)
            out = sdpa(*(torch.cat(pair, 2) for pair in zip(a, b)), bias)
            p, s = vlm.finish(p, out[:, :, :n]), expert.finish(s, out[:, :, n:])
        return net.velocity_of(s)


def emit(name, value, unit, **more):
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit} | more), flush=True)


def quantile(values, q):
    values = sorted(values)
    return values[max(0, math.ceil(q * len(values)) - 1)]


def captured(work):
    """Returns the replay of `work` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure(name, chunk, batch, prefix, denoise, runs=RUNS):
    """Times `runs` chunks by events, then by the host's clock with inputs from and actions to pinned memory."""
    def pinned(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    inputs = [(device, pinned(device)) for device in (chunk.images, chunk.prompt, chunk.state, chunk.noise)]
    for (device, host) in inputs:
        if device.dtype == torch.uint8:
            host.random_(0, 256)
        elif device.dtype == torch.int64:
            host.random_(0, chunk.net.sizes.vocab)
        else:
            host.normal_()
        device.copy_(host)
    actions = pinned(chunk.actions)
    for _ in range(WARM_UP):
        prefix()
        denoise()
    whole, first, then, host = [], [], [], []
    for _ in range(runs):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        prefix()
        marks[1].record()
        denoise()
        marks[2].record()
        torch.cuda.synchronize()
        for found, (a, b) in ((whole, (0, 2)), (first, (0, 1)), (then, (1, 2))):
            found.append(marks[a].elapsed_time(marks[b]))
    for _ in range(runs):
        begin = time.perf_counter()
        for device, upload in inputs:
            device.copy_(upload, non_blocking=True)
        prefix()
        denoise()
        actions.copy_(chunk.actions, non_blocking=True)
        torch.cuda.synchronize()
        host.append((time.perf_counter() - begin) * 1e3)
    if not torch.isfinite(actions).all():
        raise SystemExit(f"{name}: the actions are not finite")
    emit(f"{name} k{chunk.steps} b{batch} p50", quantile(whole, 0.5), "ms", p99=round(quantile(whole, 0.99), 3),
        prefix=round(quantile(first, 0.5), 3), denoise=round(quantile(then, 0.5), 3), host=round(quantile(host, 0.5), 3),
        host_p99=round(quantile(host, 0.99), 3), k=chunk.steps, b=batch, runs=runs)


def pick_attention(net):
    """Returns the fastest variant for the suffix at batch 1, timed as a graph of one step's layers."""
    times = {}
    for name, variant in VARIANTS.items():
        chunk = Chunk(net, 1, 1, variant)
        sizes = net.sizes
        q = torch.empty(1, sizes.heads, sizes.suffix, sizes.head_dim).to(chunk.keys).normal_()
        chunk.keys.normal_()
        chunk.values.normal_()

        def step(variant=variant, chunk=chunk, q=q):
            for k, v in zip(chunk.keys, chunk.values):
                variant(q, k, v, chunk.bias_suffix)
        try:
            replay = captured(step)
        except RuntimeError as error:
            print(f"attention `{name}` does not run: {str(error).splitlines()[0]}", flush=True)
            continue
        found = []
        for _ in range(20):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            replay()
            marks[1].record()
            torch.cuda.synchronize()
            found.append(marks[0].elapsed_time(marks[1]))
        times[name] = statistics.median(found) * 1e3 / sizes.depth
    best = min(times, key=times.get)
    emit("attention of an expert layer", times[best], "us", picked=best, us={n: round(t, 1) for n, t in times.items()})
    return VARIANTS[best]


def on_card(args):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    deadline = time.monotonic() + args.seconds
    with torch.device(DEVICE):
        net = Pi0(Sizes()).randomize().eval()
    torch.set_default_dtype(torch.float32)
    attend = pick_attention(net)
    batches = [int(b) for b in args.batch.split(",")]
    modes = [("graph", None)]
    if args.compile:
        modes = [("compiled graph", "default"), ("autotuned graph", "max-autotune-no-cudagraphs")]
    for name, mode in modes:
        if mode:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
            begin = time.perf_counter()
            # each kind of layer is compiled once; unrolling all 63 layers takes minutes
            for layer in (*net.vision, *net.vlm, *net.expert):
                layer.compile(mode=mode, dynamic=False)
        for steps, batch in ((10, batches[0]), (4, batches[0]), *((10, b) for b in batches[1:])):
            if time.monotonic() > deadline:
                print(f"{name} k{steps} b{batch}: left out, {args.seconds:.0f} s are over", flush=True)
                continue
            # the variant was picked at batch 1
            chunk = Chunk(net, batch, steps, attend)
            if not mode and batch == 1:
                measure("eager", chunk, batch, chunk.prefix, chunk.denoise)
            measure(name, chunk, batch, captured(chunk.prefix), captured(chunk.denoise))
            if mode and (steps, batch) == (10, batches[0]):
                emit(f"{name}: compilation and run", time.perf_counter() - begin, "s", mode=mode)


# The check against openpi's records.

def load_openpi(net, tensors):
    """Fills the network from tensors with openpi's names."""
    base, expert = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert.model."
    tower = f"{base}model.vision_tower.vision_model."

    def fill(weight, *names, gain=False):
        weight.data.copy_(torch.cat([tensors[name] for name in names]).view_as(weight) + (1 if gain else 0))

    def linear(module, *names):
        fill(module.weight, *(f"{name}.weight" for name in names))
        if module.bias is not None:
            fill(module.bias, *(f"{name}.bias" for name in names))
    linear(net.patches, f"{tower}embeddings.patch_embedding")
    fill(net.positions, f"{tower}embeddings.position_embedding.weight")
    for i, layer in enumerate(net.vision):
        own = f"{tower}encoder.layers.{i}."
        linear(layer.norm1, f"{own}layer_norm1")
        linear(layer.norm2, f"{own}layer_norm2")
        linear(layer.qkv, *(f"{own}self_attn.{p}_proj" for p in "qkv"))
        linear(layer.o, f"{own}self_attn.out_proj")
        linear(layer.fc1, f"{own}mlp.fc1")
        linear(layer.fc2, f"{own}mlp.fc2")
    linear(net.vision_norm, f"{tower}post_layernorm")
    linear(net.projector, f"{base}model.multi_modal_projector.linear")
    fill(net.embedding, f"{base}lm_head.weight")
    for layers, prefix in ((net.vlm, f"{base}model.language_model."), (net.expert, expert)):
        for i, layer in enumerate(layers):
            own = f"{prefix}layers.{i}."
            fill(layer.norm1.gain, f"{own}input_layernorm.weight", gain=True)
            fill(layer.norm2.gain, f"{own}post_attention_layernorm.weight", gain=True)
            linear(layer.qkv, *(f"{own}self_attn.{p}_proj" for p in "qkv"))
            linear(layer.o, f"{own}self_attn.o_proj")
            linear(layer.gate_up, f"{own}mlp.gate_proj", f"{own}mlp.up_proj")
            linear(layer.down, f"{own}mlp.down_proj")
    fill(net.expert_norm.gain, f"{expert}norm.weight", gain=True)
    for module, name in ((net.state_in, "state_proj"), (net.action_in, "action_in_proj"), (net.action_out, "action_out_proj"),
            (net.time_in, "action_time_mlp_in"), (net.time_out, "action_time_mlp_out")):
        linear(module, name)


@torch.no_grad()
def check(folder, compiled):
    from safetensors.torch import load_file
    folder = pathlib.Path(folder)
    d = json.loads((folder / "dims.json").read_text())["pi0_model.safetensors"]["dims"]
    want, weights = load_file(folder / "pi0_model.safetensors"), load_file(folder / "pi0_weights.safetensors")
    sizes = Sizes(d["vocab"], d["vlm_w"], d["vlm_mlp"], d["exp_w"], d["exp_mlp"], d["depth"], d["heads"], d["kv"], d["hd"], d["vis_h"],
        d["vis_mlp"], d["vis_l"], d["vis_heads"], d["img"], d["patch"], 3, d["lang"], d["horizon"], d["action_dim"])
    net = Pi0(sizes).eval()
    load_openpi(net, weights)
    embed = net.embed_images
    cameras = [want[f"pre.image.{name}"] for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")]
    if compiled:
        for layer in (*net.vision, *net.vlm, *net.expert):
            layer.compile(dynamic=False)

    def as_floats(_):
        # the records hold images in [-1, 1], the network takes bytes
        pixels = torch.stack([(c.permute(0, 2, 3, 1) + 1) * 127.5 for c in cameras], 1)
        return embed(pixels)
    net.embed_images = as_floats
    worst = 0.0

    def near(name, found, wanted):
        nonlocal worst
        gap = float((found - wanted).norm() / wanted.norm())
        print(f"{name}: relative difference {gap:.1e}")
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    for steps in (4, 10):
        for name, variant in VARIANTS.items():
            chunk = Chunk(net, 2, steps, variant, want["prefix.pad_masks"])
            chunk.prompt.copy_(want["in.tokenized_prompt"])
            chunk.state.copy_(want["in.state"])
            chunk.noise.copy_(want["ode.noise"])
            chunk.prefix()
            chunk.denoise()
            near(f"{steps} steps, attention {name}, against openpi", chunk.actions, want[f"ode{steps}.actions"])
    near("with key-value buffers, against one pass without", chunk.velocity(chunk.noise, 3), chunk.joint_velocity(chunk.noise, 3))
    net.embed_images = embed
    full = Chunk(net, 2, 4)
    full.images.random_(0, 256)
    full.prompt.random_(0, sizes.vocab)
    full.state.normal_()
    full.noise.normal_()
    full.prefix()
    near("images in bytes, no padding, against one pass without", full.velocity(full.noise, 1), full.joint_velocity(full.noise, 1))
    if worst > 1e-4:
        raise SystemExit(f"check: the largest difference is {worst:.1e}, expected at most 1e-4")
    print("check: the network is openpi's")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--batch", default="1")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", metavar="GOLDEN_DIR")
    args = parser.parse_args()
    if args.check:
        check(args.check, args.compile)
    elif not torch.cuda.is_available():
        raise SystemExit("gpu_torch_pi0: no CUDA device")
    else:
        with torch.no_grad():
            on_card(args)


if __name__ == "__main__":
    main()
