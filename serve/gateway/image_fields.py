"""Every request field of OpenAI's image generation reference, of vLLM-Omni's extras and of ours, once.

Value types are in `values.py`. Checked against openai-python 3.54 (`ImageGenerateParams`) and vLLM-Omni's image
protocol of mid 2026. What a model can do (sizes, steps, solvers, guidance) is checked by its replica, which knows it.
"""

from __future__ import annotations

from functools import partial

from serve.gateway import values as v
from serve.gateway.field import IMAGES, accepted, honoured, refused

_honoured = partial(honoured, on=(IMAGES,))
_accepted = partial(accepted, on=(IMAGES,))
_refused = partial(refused, on=(IMAGES,))

_ONE_FRAME = "images have one frame"

IMAGE_FIELDS = (
    # What to draw
    _honoured(
        "model",
        v.Name | None,
        "Name of a served image model. May be left out when only one is served.",
        "tandem-image",
    ),
    _honoured(
        "prompt",
        v.Text(32000, least=1),
        "What to draw; for a class-conditional model the name or the number of a class.",
        "a red circle on a white background",
    ),
    _honoured(
        "negative_prompt",
        v.Text(32000) | None,
        "What to steer away from; needs a guidance_scale above 1.",
        "a square",
        by="vllm",
    ),
    _honoured("n", v.Int(1, v.MAX_IMAGES) | None, "Images; image i draws its noise from seed + i. Default 1.", 2),
    _honoured("size", v.Size | None, "WIDTHxHEIGHT in pixels, or auto: the model's own. Default auto.", "64x64"),
    _honoured("width", v.Int(1, 99999) | None, "Pixels; with height, instead of size.", 64, by="vllm"),
    _honoured("height", v.Int(1, 99999) | None, "Pixels; with width, instead of size.", 64, by="vllm"),
    # How it is drawn
    _honoured("num_inference_steps", v.Int(1, 10000) | None, "Denoise steps. Default: the model's own.", 12, by="vllm"),
    _honoured(
        "guidance_scale",
        v.Num(0, 100) | None,
        "Classifier-free guidance; at 1 or below there is none. Default: the model's own.",
        4.5,
        by="vllm",
    ),
    _honoured(
        "seed",
        v.Int(0, (1 << 63) - 1) | None,
        "Same seed and request, same image; the answer tells it. Default: drawn, of 32 bits.",
        7,
        by="vllm",
    ),
    _honoured(
        "scheduler",
        v.Text(64, least=1) | None,
        "Solver of the denoising equation; /v1/models lists them (image.solvers). Default: the model's own.",
        "flow_match_euler_stochastic",
        by="tandem",
    ),
    # What comes back
    _honoured("output_format", v.ImageFormat | None, "png, jpeg or webp. Default png.", "webp"),
    _honoured(
        "output_compression",
        v.Int(0, 100) | None,
        "Quality of jpeg and webp in percent; png has no loss. Default 100.",
        80,
    ),
    _honoured(
        "response_format",
        v.ImageResponse | None,
        "b64_json, the only one: images are not kept here, so there is no URL to fetch them from.",
        "b64_json",
    ),
    _honoured("stream", bool | None, "Server-sent events: previews, then each image when it is finished.", True),
    _honoured(
        "partial_images",
        v.Int(0, v.MAX_PREVIEWS) | None,
        "Previews of each image, spread over its steps: true estimates of the finished one. Needs stream. Default 0.",
        2,
    ),
    _honoured(
        "stream_progress",
        bool | None,
        "image_generation.progress events with index, step and num_steps. Needs stream.",
        True,
        by="tandem",
    ),
    # How it is scheduled
    _honoured(
        "priority", v.Int(-1000, 1000) | None, "Smaller runs earlier; waiting outweighs it in time.", -1, by="vllm"
    ),
    _honoured(
        "request_id", v.RequestId | None, "Part of the answer's id; also as header x-request-id.", "job-1", by="vllm"
    ),
    _honoured(
        "timeout",
        v.Num(0, 86400, above=True) | None,
        "Seconds from acceptance to the last image, at most the server's own limit; also as header x-request-timeout.",
        60,
        by="tandem",
    ),
    # Accepted: no effect on the answer, by their own definition
    _accepted("user", v.Text(1024) | None, "Of equal replicas a user keeps to one.", "u-1"),
    _accepted("safety_identifier", v.Text(1024) | None, "An identifier of the caller's.", "u-1"),
    _accepted("moderation", v.Moderation | None, "Nothing is moderated here.", "low"),
    # Refused
    _refused("quality", "the number of steps decides; set num_inference_steps", "auto", "standard"),
    _refused("background", "images have no transparency", "auto", "opaque"),
    _refused("style", "say it in the prompt"),
    _refused("complexity", "nothing is planned before drawing; set num_inference_steps"),
    _refused("frame_count", _ONE_FRAME),
    _refused("frame_duration_ms", _ONE_FRAME),
    _refused("svg", "images are made of pixels"),
    _refused("true_cfg_scale", "use guidance_scale", by="vllm"),
    _refused("flow_shift", "the model's own sigmas are used", by="vllm"),
    _refused("max_sequence_length", "the model's own text encoders decide", by="vllm"),
    _refused("generator_device", "noise does not depend on the device", "cpu", by="vllm"),
    _refused("lora", "adapters are not supported", by="vllm"),
    _refused("extra_params", "there are no extensions to take them", {}, by="vllm"),
)
