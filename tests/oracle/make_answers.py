"""Make the golden scores of rerankers that answer with a token.

The models are tiny GGUF files of `../data`, which transformers loads by itself. Some of their
weights and settings are changed, as the tests change them too. Each pair is put together and scored
as the authors of such a reranker do it in their own code. Run once, by hand.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers as tf
from common import DATA, ragged

PAIRS = json.loads((DATA / "pairs.json").read_text(encoding="utf-8"))
INSTRUCTION = "Find what a crab would eat"


def load(name: str, **config: object) -> tuple[tf.PreTrainedModel, Callable[[str], list[int]]]:
    """Return a model in f32, and what splits a text into ids without adding any."""
    file = {"gguf_file": f"{name}.gguf"}
    model = tf.AutoModelForCausalLM.from_pretrained(
        DATA, **file, dtype=torch.float32, attn_implementation="eager", **config
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(DATA, **file)
    return model.eval(), lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def untie(model: tf.PreTrainedModel, seed: int) -> None:
    """Give a model an output matrix of its own, with a bias."""
    n_vocab, width = model.get_input_embeddings().weight.shape
    generator = torch.Generator().manual_seed(seed)
    model.lm_head = torch.nn.Linear(width, n_vocab)
    with torch.no_grad():
        for weight in model.lm_head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)


def logits(model: tf.PreTrainedModel, rows: Sequence[Sequence[int]], tokens: Sequence[int]):
    """Return the logits of some tokens after each row of ids."""
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=torch.tensor([row])).logits[0, -1, tokens] for row in rows]
        )


def tokens_of(split: Callable[[str], list[int]], *answers: str) -> list[int]:
    """Return the token of each answer."""
    ids = [split(answer) for answer in answers]
    if any(len(found) != 1 for found in ids):
        raise ValueError(f"not one token each: {dict(zip(answers, ids, strict=True))}")
    return [token for (token,) in ids]


def pairs(encode: Callable[[str, str], list[int]]) -> list[list[int]]:
    """Return the ids of every query with every document."""
    return [
        encode(query, document) for query in PAIRS["queries"] for document in PAIRS["documents"]
    ]


def qwen3() -> dict[str, np.ndarray]:
    """As on the model card of Qwen3-Reranker."""
    model, split = load("tiny-qwen3", head_dim=16)
    before = split(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    after = split("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tokens = tokens_of(split, "no", "yes")
    found = {}
    for name, task in (
        ("qwen3", "Given a web search query, retrieve relevant passages that answer the query"),
        ("qwen3_instructed", INSTRUCTION),
    ):
        rows = pairs(
            lambda query, document, task=task: [
                *before,
                *split(f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"),
                *after,
            ]
        )
        scores = logits(model, rows, tokens).log_softmax(1)[:, 1].exp()
        found |= named(name, rows, scores)
    return found


def zerank() -> dict[str, np.ndarray]:
    """As modeling_zeranker.py does it, but the tiny vocabulary spells "Yes" with two tokens."""
    model, split = load("tiny-qwen3", head_dim=16)
    rows = pairs(
        lambda query, document: split(
            f"<|im_start|>system\n{query.strip()}<|im_end|>\n"
            f"<|im_start|>user\n{document.strip()}<|im_end|>\n<|im_start|>assistant\n"
        )
    )
    return named("zerank", rows, logits(model, rows, tokens_of(split, "yes"))[:, 0] / 5.0)


def mxbai() -> dict[str, np.ndarray]:
    """As mxbai_rerank_v2.py does it: parts are split on their own."""
    model, split = load("tiny-qwen2")
    untie(model, seed=31)
    tokens = tokens_of(split, "1", "0")
    found = {
        "mxbai_weight": model.lm_head.weight.detach()[tokens].numpy(),
        "mxbai_bias": model.lm_head.bias.detach()[tokens].numpy(),
    }
    start = split(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n"
    )
    task = split(
        "You are a search relevance expert who evaluates how well documents match search queries. "
        "For each query-document pair, carefully analyze the semantic relationship between them, "
        "then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\n"
        "Relevance:"
    )
    end = split("<|im_end|>\n<|im_start|>assistant\n")
    for name, given in (("mxbai", ""), ("mxbai_instructed", f"instruction: {INSTRUCTION}\n")):
        rows = pairs(
            lambda query, document, given=given: [
                *start,
                *split(f"{given}query: {query}"),
                *split("\n"),
                *split(f"document: {document}"),
                *split("\n"),
                *task,
                *end,
            ]
        )
        yes, no = logits(model, rows, tokens).unbind(1)
        found |= named(name, rows, yes - no)
    return found


def gemmas() -> dict[str, np.ndarray]:
    """As FlagEmbedding does it, with Gemma, and with Gemma 2 and a low cap of logits."""
    # The GGUF does not say how attention scales its scores.
    model, split = load("tiny-gemma2", final_logit_softcapping=0.5, query_pre_attn_scalar=16)
    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'."
    )
    rows = pairs(
        lambda query, document: [
            2,  # <s>
            *split(f"A: {query}"),
            *split("\n"),
            *split(f"B: {document}"),
            *split("\n"),
            *split(prompt),
        ]
    )
    tokens = tokens_of(split, "1")
    return {
        **named("gemma2", rows, logits(model, rows, tokens)[:, 0]),
        **named("gemma", rows, logits(gemma_of(model), rows, tokens)[:, 0]),
    }


def gemma_of(model: tf.Gemma2ForCausalLM) -> tf.GemmaForCausalLM:
    """Return a Gemma with the weights of a Gemma 2, which has two norms more per layer."""
    old = model.config
    config = tf.GemmaConfig(
        **{
            name: getattr(old, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "rms_norm_eps",
            )
        },
        hidden_activation="gelu_pytorch_tanh",
    )
    gemma = tf.GemmaForCausalLM(config).eval()
    weights = {
        # The norm before the feed-forward layer. Gemma calls it by what comes before it.
        name.replace("pre_feedforward_layernorm", "post_attention_layernorm"): weight
        for name, weight in model.state_dict().items()
        if "post_" not in name
    }
    gemma.load_state_dict(weights)
    return gemma


def llama() -> dict[str, np.ndarray]:
    """A plain template, a vocabulary of pieces, and two answers."""
    model, split = load("tiny-llama")
    rows = pairs(lambda query, document: [1, *split(f"{query} : {document} :")])
    yes, no = logits(model, rows, tokens_of(split, "the", "of")).unbind(1)
    return named("llama", rows, yes - no)


def named(name: str, rows: list[list[int]], scores: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the arrays of a case."""
    arrays = {**ragged(rows), "scores": scores.numpy().astype(np.float32)}
    print(f"{name}: up to {max(map(len, rows))} tokens, {scores.min():.4f} to {scores.max():.4f}")
    return {f"{name}_{key}": array for key, array in arrays.items()}


def main() -> None:
    """Make all of them."""
    torch.set_num_threads(1)
    found = {}
    for make in (qwen3, zerank, mxbai, gemmas, llama):
        found |= make()
    np.savez_compressed(DATA / "answers.npz", **found)


if __name__ == "__main__":
    main()
