"""The head of models that predict a token bit by bit: loss, sampling, packed bits."""
