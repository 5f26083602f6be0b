"""The sprites text side: a word-level tokenizer and a one-layer UMT5, both in the stock transformers layout."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from distill.data.scenes import RELATIONS
from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SPEEDS

ROWS = 16  # text rows of the transformer; the engine reads them from tokenizer.model_max_length
DIM = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the captions is a token; any other word is <unk>."""
    words = ["<pad>", "</s>", "<unk>", "a", "and", "on", "moving", "background"]
    words += [*COLOURS, *SHAPES, *DIRECTIONS, *SPEEDS, *BACKGROUNDS]
    # New words come last, so that older ids stay.
    words += [word for word in dict.fromkeys(" ".join(RELATIONS).split()) if word not in words]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=ROWS,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=DIM,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def encode(tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, captions: list[str]) -> Tensor:
    """Captions -> [B, rows, 64]. Rows after the real tokens are zeroed behind the encoder, as in Wan."""
    rows = min(tokenizer.model_max_length, 512)
    tokens = tokenizer(captions, padding="max_length", max_length=rows, truncation=True, return_tensors="pt")
    tokens = tokens.to(encoder.device)
    hidden = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return hidden * tokens.attention_mask[..., None].to(hidden.dtype)
