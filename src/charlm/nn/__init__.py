"""The model as pure functions: recurrent cells, the recurrence that unrolls any cell, cuDNN's LSTM, and `CharLM`."""
