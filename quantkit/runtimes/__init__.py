"""What vLLM, llama.cpp and transformers demand of a checkpoint, how much memory they need, and how they are started."""
