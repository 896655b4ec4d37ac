"""The least time of a pi0 chunk on a card: floating-point operations over the rate, bytes over the bandwidth, the larger counts."""

# published sizes
LAYERS, PROMPT, SUFFIX, HEADS_WIDTH, KV_WIDTH = 18, 48, 51, 2048, 512
VLM, EXPERT = (2048, 16384), (1024, 4096)
VISION_LAYERS, VISION_TOKENS, VISION_WIDTH, VISION_MLP, PIXELS = 27, 256, 1152, 4304, 588
BF16 = 2


def layer_weights(width, mlp):
    return width * (HEADS_WIDTH + KV_WIDTH) + HEADS_WIDTH * width + 3 * width * mlp


def stages(steps, batch, cameras):
    """Returns {stage: (floating-point operations, bytes)} of a chunk of `batch` rows."""
    vision_weights = VISION_LAYERS * (4 * VISION_WIDTH**2 + 2 * VISION_WIDTH * VISION_MLP) + VISION_WIDTH * (PIXELS + VLM[0])
    vision = 2 * VISION_TOKENS * vision_weights + VISION_LAYERS * 4 * VISION_TOKENS**2 * VISION_WIDTH
    tokens = cameras * VISION_TOKENS + PROMPT
    # nothing reads the last layer's output, only its k and v
    whole, last = LAYERS - 1, VLM[0] * KV_WIDTH
    prefix_weights = whole * layer_weights(*VLM) + last
    prefix = 2 * tokens * prefix_weights + whole * 4 * tokens**2 * HEADS_WIDTH
    step_weights = LAYERS * layer_weights(*EXPERT)
    step = 2 * SUFFIX * step_weights + LAYERS * 4 * SUFFIX * (tokens + SUFFIX) * HEADS_WIDTH
    kept = BF16 * LAYERS * (tokens + SUFFIX) * KV_WIDTH
    return {
        "vision": (batch * cameras * vision, BF16 * vision_weights),
        "prefix": (batch * prefix, BF16 * prefix_weights),
        "denoise": (steps * batch * step, steps * (BF16 * step_weights + batch * kept)),
    }


def floor_ms(steps, batch, tflops, gb_s, cameras=3):
    return sum(max(flops / tflops / 1e9, size / gb_s / 1e6) for flops, size in stages(steps, batch, cameras).values())
