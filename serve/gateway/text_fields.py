"""Every request field of OpenAI's chat-completions and completions reference and of vLLM's extras, once.

Value types are in `values.py`. Checked against openai-python 3.52 (`CompletionCreateParams`) and vLLM's protocol.py of
mid 2026 (commit 002032e).
"""

from __future__ import annotations

from functools import partial

from serve.gateway import values as v
from serve.gateway.beams import MOST_BEAMS
from serve.gateway.field import CHAT, COMPLETIONS, accepted, honoured, refused
from serve.gateway.messages import Messages
from serve.gateway.structured import ResponseFormat, StructuredOutputs
from serve.gateway.tools import MAX_TOOLS, Choice, Tools
from serve.text.beams.params import MOST_LENGTH_PENALTY

_BOTH = (CHAT, COMPLETIONS)
_honoured = partial(honoured, on=_BOTH)
_accepted = partial(accepted, on=_BOTH)
_refused = partial(refused, on=_BOTH)

_FUNCTIONS = "it is the older form of tools; use tools and tool_choice"
_RESPONSE_FORMAT = (
    "text; json_object; json_schema, always enforced, whatever strict says; structural_tag as in vLLM. A JSON Schema "
    "keyword that cannot be enforced is refused. Answers begin with the JSON: there is no reasoning before it."
)
_MEDIA = "only text goes in and out"
_RESULT_ONLY = "not part of the answers here"


def _moved(name: str) -> str:
    """The remedy for a field that vLLM 0.12 removed."""
    return f"use structured_outputs with {name}"


TEXT_FIELDS = (
    # What to continue
    _honoured(
        "model", v.Name | None, "Name of a served model. May be left out when only one is served.", "tandem-text"
    ),
    _honoured(
        "messages",
        Messages,
        "The conversation: roles system, developer (as system), user, assistant, tool; text only.",
        [{"role": "user", "content": "hi"}],
        on=(CHAT,),
    ),
    _honoured("prompt", v.Prompt, "Text, token ids, or a list of either (at most 256).", "hi", on=(COMPLETIONS,)),
    # Tools and reasoning
    _honoured(
        "tools",
        Tools | None,
        f"Up to {MAX_TOOLS} functions the model may call. The model's chat template must know tools. strict: a call "
        "follows the schema in any case where the model's format has a marker (hermes, mistral); in other formats only "
        "under tool_choice required.",
        [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}],
        on=(CHAT,),
    ),
    _honoured(
        "tool_choice",
        Choice | None,
        "auto (default with tools); none: the model does not see the tools; required, or one tool by name: a grammar "
        "makes the answer a call that follows the tool's schema, without reasoning before it.",
        "auto",
        on=(CHAT,),
    ),
    _honoured(
        "parallel_tool_calls",
        bool | None,
        "false: the answer ends with its first call. Default true.",
        False,
        on=(CHAT,),
    ),
    _honoured(
        "include_reasoning",
        bool | None,
        "false: reasoning_content is left out of the answer; it is generated and counted all the same.",
        False,
        on=(CHAT,),
        by="vllm",
    ),
    # What it must be
    _honoured("response_format", ResponseFormat | None, _RESPONSE_FORMAT, {"type": "json_object"}, on=(CHAT,)),
    _honoured(
        "response_format",
        ResponseFormat | None,
        _RESPONSE_FORMAT,
        {"type": "json_object"},
        on=(COMPLETIONS,),
        by="vllm",
    ),
    _honoured(
        "structured_outputs",
        StructuredOutputs | None,
        "Exactly one of json (a schema), regex (the whole output), choice (a list of strings), grammar (EBNF as GBNF, "
        "or Lark), json_object, structural_tag; with disable_any_whitespace JSON has no whitespace.",
        {"choice": ["yes", "no"]},
        by="vllm",
    ),
    # How much
    _honoured(
        "max_completion_tokens",
        v.Int(1) | None,
        "Most tokens to generate. Default: what is left of the context.",
        16,
        on=(CHAT,),
    ),
    _honoured("max_tokens", v.Int(1) | None, "Older name of max_completion_tokens.", 16, on=(CHAT,)),
    _honoured(
        "max_tokens",
        v.Int(0) | None,
        "Most tokens to generate; 0 only scores the prompt. Default 16.",
        16,
        on=(COMPLETIONS,),
    ),
    _honoured("min_tokens", v.Int(0) | None, "End and stop tokens are ruled out before.", 1, by="vllm"),
    _honoured("n", v.Int(1, 128) | None, "Choices per prompt; choice i draws from seed + i.", 2),
    _honoured("stop", v.Stop, "Up to 16 strings that end a choice; not part of its text.", ["END"]),
    _honoured("stop_token_ids", v.TokenIds(128) | None, "Token ids that end a choice.", [1], by="vllm"),
    _honoured("include_stop_str_in_output", bool | None, "Keep the stop string in the text.", True, by="vllm"),
    _honoured("ignore_eos", bool | None, "Go on after the model's end token.", True, by="vllm"),
    # Sampling
    _honoured("temperature", v.Num(0, 2) | None, "0 is greedy. Default 1.", 0.7),
    _honoured("top_p", v.Num(0, 1, above=True) | None, "Smallest set of tokens of this probability. Default 1.", 0.9),
    _honoured("top_k", v.Int(-1) | None, "The k most likely tokens; 0 or -1: all.", 40, by="vllm"),
    _honoured(
        "min_p", v.Num(0, 1) | None, "Tokens of at least this share of the best one's probability.", 0.05, by="vllm"
    ),
    _honoured("presence_penalty", v.Num(-2, 2) | None, "On tokens already generated.", 0.5),
    _honoured("frequency_penalty", v.Num(-2, 2) | None, "On tokens already generated, times their count.", 0.5),
    _honoured(
        "repetition_penalty",
        v.Num(0, 10, above=True) | None,
        "On tokens of prompt and output; 1 is none.",
        1.1,
        by="vllm",
    ),
    _honoured(
        "logit_bias", v.LogitBias | None, "Token id to a value from -100 to 100; at most 1024 entries.", {"1": -100}
    ),
    _honoured(
        "seed", v.Int(-(1 << 63), (1 << 64) - 1) | None, "Same seed and request, same tokens. Default: drawn.", 7
    ),
    # Beam search: likely outputs are searched for instead of drawn
    _honoured(
        "num_beams",
        v.Int(1, MOST_BEAMS) | None,
        "Beams of transformers' beam search; the n best are returned, with beam_score. 1 is no search. Needs "
        "temperature 0, 1 or none, no top_p, top_k, min_p or stop; logprobs only of the chosen tokens.",
        4,
        by="tandem",
    ),
    _honoured(
        "num_beam_groups",
        v.Int(1, MOST_BEAMS) | None,
        "Diverse beam search: groups of equally many beams; needs diversity_penalty, not with repetition_penalty.",
        2,
        by="tandem",
    ),
    _honoured(
        "diversity_penalty",
        v.Num(0, 100) | None,
        "What a token costs for every beam of an earlier group that chooses it in the same step.",
        0.5,
        by="tandem",
    ),
    _honoured(
        "length_penalty",
        v.Num(-MOST_LENGTH_PENALTY, MOST_LENGTH_PENALTY) | None,
        "beam_score is the sum of log-probabilities over length ** length_penalty. Default 1.",
        0.8,
        by="vllm",
    ),
    _honoured(
        "early_stopping",
        v.EarlyStopping | None,
        'With num_beams outputs finished: true ends; false (default) ends when none is likely to be better, "never" '
        "when none can be.",
        True,
        by="vllm",
    ),
    _honoured(
        "use_beam_search",
        bool | None,
        "As in vLLM: beam search with n beams, all returned; num_beams may be more than n.",
        True,
        by="vllm",
    ),
    # What comes back
    _honoured("stream", bool | None, "Server-sent events instead of one answer.", True),
    _honoured(
        "stream_options",
        v.StreamOptions | None,
        "include_usage, continuous_usage_stats (vLLM); include_obfuscation has no effect.",
        {"include_usage": True},
    ),
    _honoured("logprobs", bool | None, "Log-probabilities of the tokens of the answer.", True, on=(CHAT,)),
    _honoured("top_logprobs", v.Int(0, 20) | None, "Alternatives per token; needs logprobs.", 2, on=(CHAT,)),
    _honoured(
        "logprobs",
        v.Int(0, 20) | None,
        "Log-probabilities with this many alternatives per token.",
        2,
        on=(COMPLETIONS,),
    ),
    _honoured(
        "echo",
        bool | None,
        "The prompt before the completion, with its logprobs when asked for.",
        True,
        on=(COMPLETIONS,),
    ),
    _honoured(
        "echo",
        bool | None,
        "The last message's text before the answer when it is an assistant's.",
        True,
        on=(CHAT,),
        by="vllm",
    ),
    _honoured(
        "prompt_logprobs", v.Int(0, 20) | None, "Log-probabilities of the prompt; not with stream.", 1, by="vllm"
    ),
    _honoured("return_token_ids", bool | None, "token_ids and prompt_token_ids beside the text.", True, by="vllm"),
    _honoured("return_tokens_as_token_ids", bool | None, "Logprob tokens as token_id:N.", True, by="vllm"),
    _honoured(
        "skip_special_tokens", bool | None, "Special tokens stay out of the text. Default true.", False, by="vllm"
    ),
    # How the prompt is made
    _honoured(
        "add_special_tokens",
        bool | None,
        "Begin-of-text and the like around a text prompt. Default true.",
        False,
        on=(COMPLETIONS,),
        by="vllm",
    ),
    _honoured(
        "add_generation_prompt",
        bool | None,
        "The template opens an assistant message. Default true.",
        False,
        on=(CHAT,),
        by="vllm",
    ),
    _honoured(
        "continue_final_message",
        bool | None,
        "The last message is continued; needs add_generation_prompt false.",
        True,
        on=(CHAT,),
        by="vllm",
    ),
    _honoured(
        "chat_template_kwargs",
        v.TemplateKwargs | None,
        "Variables for the model's template: up to 32 strings, numbers or booleans.",
        {"enable_thinking": False},
        on=(CHAT,),
        by="vllm",
    ),
    _honoured(
        "reasoning_effort",
        v.Effort | None,
        "Given to the template, with enable_thinking, as in vLLM.",
        "low",
        on=(CHAT,),
    ),
    _honoured(
        "truncate_prompt_tokens", v.Int(-1) | None, "Keep this many prompt tokens; -1: what fits.", 64, by="vllm"
    ),
    _honoured("truncation_side", v.Side | None, "Which side is cut; default left.", "right", by="vllm"),
    # How it is scheduled
    _honoured(
        "priority", v.Int(-1000, 1000) | None, "Smaller runs earlier; waiting outweighs it in time.", -1, by="vllm"
    ),
    _honoured(
        "cache_salt",
        v.Text(1024, least=1) | None,
        "Prefixes are shared only with requests of the same salt.",
        "s",
        by="vllm",
    ),
    _honoured(
        "request_id", v.RequestId | None, "Part of the answer's id; also as header x-request-id.", "job-1", by="vllm"
    ),
    _honoured(
        "timeout",
        v.Num(0, 86400, above=True) | None,
        "Seconds from acceptance to the last token, at most the server's own limit; also as header x-request-timeout.",
        60,
        by="tandem",
    ),
    # Accepted: no effect on the answer, by their own definition
    _accepted("user", v.Text(1024) | None, "Of equal replicas a user keeps to one.", "u-1"),
    _accepted("safety_identifier", v.Text(1024) | None, "An identifier of the caller's.", "u-1", on=(CHAT,)),
    _accepted("session_id", v.Text(1024) | None, "Of equal replicas a session keeps to one.", "s-1", by="vllm"),
    _accepted("metadata", v.Metadata | None, "The caller's own notes.", {"team": "a"}, on=(CHAT,)),
    _accepted("store", bool | None, "Nothing is stored.", True, on=(CHAT,)),
    _accepted("service_tier", v.Text(64) | None, "There is one tier.", "auto", on=(CHAT,)),
    _accepted(
        "prompt_cache_key", v.Text(1024) | None, "Prefixes are found by content; else as session_id.", "k", on=(CHAT,)
    ),
    _accepted("prompt_cache_retention", v.Text(64) | None, "Prefixes stay while there is room.", "24h", on=(CHAT,)),
    _accepted(
        "prompt_cache_options", v.Opaque | None, "Prefixes are found by content.", {"mode": "implicit"}, on=(CHAT,)
    ),
    _accepted("prediction", v.Opaque | None, "A hint for speed only.", {"type": "content", "content": "x"}, on=(CHAT,)),
    _accepted("spaces_between_special_tokens", bool | None, "The tokenizer's own decoder decides.", True, by="vllm"),
    # Refused
    _refused("functions", _FUNCTIONS, [], on=(CHAT,)),
    _refused("function_call", _FUNCTIONS, "none", "auto", on=(CHAT,)),
    _refused("audio", _MEDIA, on=(CHAT,)),
    _refused("modalities", _MEDIA, ["text"], on=(CHAT,)),
    _refused("moderation", "there is no moderation", on=(CHAT,)),
    _refused("verbosity", "the models here know no verbosity; say it in a message", "medium", on=(CHAT,)),
    _refused("web_search_options", "there is no web search", on=(CHAT,)),
    _refused("suffix", "text cannot be inserted before a suffix", "", on=(COMPLETIONS,)),
    _refused("best_of", "choices are not generated beyond n; raise n", 1, on=(COMPLETIONS,)),
    _refused("best_of", "choices are not generated beyond n; raise n", 1, on=(CHAT,), by="vllm"),
    _refused("allowed_token_ids", "use logit_bias", by="vllm"),
    _refused("bad_words", "use logit_bias with token ids", [], by="vllm"),
    _refused("logprob_token_ids", "use logprobs with alternatives", by="vllm"),
    _refused("logits_processors", "requests carry no code", [], by="vllm"),
    _refused("watermarking", "output is not watermarked", False, by="vllm"),
    _refused("repetition_detection", "use repetition_penalty or frequency_penalty", by="vllm"),
    _refused("guided_json", _moved("json"), by="vllm"),
    _refused("guided_regex", _moved("regex"), by="vllm"),
    _refused("guided_choice", _moved("choice"), by="vllm"),
    _refused("guided_grammar", _moved("grammar"), by="vllm"),
    _refused("guided_decoding_backend", "there is one; leave it out", by="vllm"),
    _refused("guided_whitespace_pattern", _moved("disable_any_whitespace"), by="vllm"),
    _refused("structural_tag", _moved("structural_tag"), by="vllm"),
    _refused("thinking_token_budget", "reasoning ends where the model ends it; use max_tokens", -1, by="vllm"),
    _refused("chat_template", "templates come from the model only", on=(CHAT,), by="vllm"),
    _refused("add_special_tokens", "the chat template writes them", False, on=(CHAT,), by="vllm"),
    _refused("documents", "put documents into a message", [], on=(CHAT,), by="vllm"),
    _refused("media_io_kwargs", _MEDIA, {}, on=(CHAT,), by="vllm"),
    _refused("mm_processor_kwargs", _MEDIA, {}, on=(CHAT,), by="vllm"),
    _refused("prompt_embeds", "requests carry no tensors", on=(COMPLETIONS,), by="vllm"),
    _refused("stream_interval", "an event goes out with every step", 1, by="vllm"),
    _refused("return_prompt_text", "use /tokenize", False, on=(CHAT,), by="vllm"),
    _refused("return_token_offsets", _RESULT_ONLY, False, by="vllm"),
    _refused("return_mm_kwargs", _RESULT_ONLY, True, by="vllm"),
    _refused("routed_experts_prompt_start", _RESULT_ONLY, 0, by="vllm"),
    _refused("kv_transfer_params", "caches are not transferred", {}, by="vllm"),
    _refused("ec_transfer_params", "caches are not transferred", {}, by="vllm"),
    _refused("vllm_xargs", "there are no extensions to take them", {}, by="vllm"),
)
