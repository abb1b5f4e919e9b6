"""From messages to tokens: templates, masks, tokenizers."""
