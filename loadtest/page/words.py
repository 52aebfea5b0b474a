"""What the words of a report mean: the definitions that its figures follow."""

from __future__ import annotations

DEFINITIONS = {
    "scheduled": """When a request was due by the load's arrival process. All times count from it, so neither a slow
        client nor a full server hides behind late requests. In a closed loop it is when the request is sent.""",
    "TTFT": "To the first non-empty piece of content. A piece that only names the role does not count.",
    "TPOT": "(E2E - TTFT) / (output tokens - 1), of each request.",
    "ITL": "Every gap between two pieces of content, of all requests together. A piece may hold several tokens.",
    "E2E": "To the last byte of the answer.",
    "TTFP": "To the first preview of an image.",
    "good": """Answered, with what was asked, within every limit. Errors, 429s and timeouts are not good; requests that
        the load itself cancelled, and probes, are not counted.""",
    "goodput": "Good requests a second.",
    "throughput": """Sum over the time from the start to the last answer. Warm-up requests are sent before the start and
        not counted.""",
    "megapixel-steps/s": "Width x height x denoise steps x images, in millions a second: for loads of mixed sizes.",
    "queue share": """Seconds that requests waited in the server's queues, by its own metric, over their seconds from
        sent to ended.""",
    "client lag": "From scheduled to sent. Large: the client was too slow, or --max-concurrency made requests wait.",
    "highest rate at SLO": """The highest rate of arrivals at which the wanted share of requests is good, confirmed with
        other arrivals and other requests.""",
}
