"""Tiny models and data for the recipes, made on the spot: try them on a CPU, without a download.

    python examples/recipes/tiny.py tiny
    python examples/recipes/rerank.py --model_name_or_path tiny/model --data_file tiny/rerank.jsonl --output_dir out --use_cpu

The models have random weights and a vocabulary of a few words, so that what they say is sometimes right. They are there to see
that a recipe runs, what it shares, and that the weights are those of stock TRL; nothing is learned that would make sense.
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HAS_PILLOW = importlib.util.find_spec("PIL") is not None
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
MARKS = ["<user>", "<assistant>", "<image>", "[", "]"]
NUMBERS = [str(number) for number in range(1, 21)]
NOUNS = [
    f"{colour}{thing}" for colour in ("red", "blue", "old", "tall") for thing in ("door", "tree", "river", "house")
]
VOCABULARY = ["<pad>", "<eos>", "<unk>", *MARKS, *TAGS, *NUMBERS, *NOUNS]
TEMPLATE = (
    "{% for message in messages %}<user> {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word between spaces."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"], extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_tools_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, with Qwen3's chat template, of which TRL knows how calls of tools look."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>"], "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3_instruct_2507.jinja").read_text()
    return tokenizer


def text_config(tokenizer: PreTrainedTokenizerFast, size: int, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size // 4,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, size: int, layers: int, dtype: torch.dtype) -> None:
    """A Qwen3 with random weights, and its tokenizer."""
    torch.manual_seed(0)
    config = text_config(tokenizer, size, layers)
    save(Qwen3ForCausalLM(config), folder, config, dtype)
    tokenizer.save_pretrained(folder)


def make_vision_model(folder: Path, size: int, layers: int, dtype: torch.dtype) -> None:
    """A LLaVA with random weights, and its processor, which needs Pillow; an image is 64 tokens."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = text_config(tokenizer, size, layers)
    vision = CLIPVisionConfig(
        hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token, vision_feature_layer=-2)
    save(LlavaForConditionalGeneration(config), folder, text, dtype)
    pixels = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def save(model: torch.nn.Module, folder: Path, config: Qwen3Config, dtype: torch.dtype) -> None:
    model.generation_config = GenerationConfig(pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id)
    model.to(dtype).save_pretrained(folder)


def words(source: random.Random, count: int) -> str:
    return " ".join(source.choices(NOUNS, k=count))


def make_data(folder: Path, rows: int = 8, length: int = 10) -> None:
    """A JSON file for each recipe.

    Args:
        folder: where they go.
        rows: lines in a file.
        length: words of a document; a page has five times as many.
    """
    source = random.Random(0)

    def write(name: str, lines: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("rerank.jsonl", [
        {"query": words(source, 4), "documents": [words(source, length) for _ in range(20)], "relevant": source.randint(1, 20)}
        for _ in range(rows)
    ])  # fmt: skip
    write("rag.jsonl", [
        {"question": words(source, 4), "pages": [words(source, 5 * length) for _ in range(4)], "nuggets": source.sample(NOUNS, 4)}
        for _ in range(rows)
    ])  # fmt: skip
    write("one.jsonl", [{"prompt": words(source, 20 * length), "answer": 7}])
    write("tools.jsonl", [
        {"question": f"What is {word}?", "answer": "e", "entries": {word: words(source, length)}} for word in NOUNS[:rows]
    ])  # fmt: skip
    write("pairs.jsonl", [
        {"prompt": words(source, 20 * length), "chosen": words(source, length), "rejected": words(source, length)}
        for _ in range(rows)
    ])  # fmt: skip


def make_images(folder: Path, rows: int = 8, length: int = 10) -> None:
    """Images of random pixels, and a JSON file of questions about them."""
    from PIL import Image

    source = random.Random(1)
    lines = []
    for number in range(rows):
        pixels = bytes(source.choices(range(256), k=32 * 32 * 3))
        Image.frombytes("RGB", (32, 32), pixels).save(folder / f"{number}.png")
        lines.append({"images": [f"{number}.png"], "question": words(source, length), "answer": source.choice(NOUNS)})
    (folder / "vision.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make(folder: Path, size: int = 32, layers: int = 1, length: int = 10, dtype: torch.dtype = torch.float32) -> None:
    """Make everything in a folder: `model`, `tools-model`, with Pillow `vision-model`, and the data."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", make_tokenizer(), size, layers, dtype)
    make_model(folder / "tools-model", make_tools_tokenizer(), size, layers, dtype)
    make_data(folder, length=length)
    if HAS_PILLOW:
        make_vision_model(folder / "vision-model", size, layers, dtype)
        make_images(folder, length=length)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32, help="hidden size of the models")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--length", type=int, default=10, help="words of a document; a page has five times as many")
    args = parser.parse_args()
    make(args.folder, args.size, args.layers, args.length)
    print(f"made models and data in {args.folder}{'' if HAS_PILLOW else ', without images: pip install pillow'}")


if __name__ == "__main__":
    main()
