"""BERT as a text tower: transformers' own module, built from sizes.

Axes: batch, length (tokens of a text, at most the context length), dim. A text is what stands up to and including its
first `end_token`; attention sees nothing behind it.
"""

from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.nn.attention import in_one_kernel
from pipeline.nn.text import Vocabulary, inside_text


class Bert(nn.Module):
    """Token ids to the last layer's states; position 0 ([CLS]) stands for the sentence. The pooler is not built.

    `vocabulary` shrinks the embedding table; None gives every id its own row.
    Source: BERT (post-norm encoder, GELU, LayerNorm eps 1e-12), transformers' `BertModel`.
    """

    sizes_vary = True  # of its batches, in length where padding is to the longest; see `compile_blocks`

    def __init__(
        self,
        *,
        vocab_size: int,
        positions: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        end_token: int,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        from transformers.models.bert import BertConfig, BertModel

        self.end_token, self.vocabulary = end_token, vocabulary
        config = BertConfig(
            vocab_size=vocab_size if vocabulary is None else vocabulary.size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=positions,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.model = BertModel(config, add_pooling_layer=False)

    def states(self, token_ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """A vector per token, those of the padding included."""
        inside = inside_text(token_ids, self.end_token)
        ids = token_ids if self.vocabulary is None else self.vocabulary(token_ids)
        kernel = in_one_kernel(token_ids)
        self.model.config._attn_implementation = "sdpa" if kernel else "eager"
        mask = inside[:, None, None] if kernel else inside.long()  # transformers would wait for the GPU to look at it
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    forward = states
