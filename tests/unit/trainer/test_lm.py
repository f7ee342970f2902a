import pytest

from anyshard.configs.errors import ConfigError
from anyshard.trainer.lm import check_vocabulary


def test_a_tokenizer_that_the_model_embeds_is_let_through():
    check_vocabulary(4096, 4096, "bpe")
    check_vocabulary(50_304, 50_257, "gpt2")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused():
    with pytest.raises(ConfigError) as caught:
        check_vocabulary(4096, 4097, "bpe")
    text = str(caught.value)
    assert "data.tokenizer=bpe: it has 4097 tokens, but the model embeds 4096." in text
    assert "model.config.vocab_size=4097" in text
