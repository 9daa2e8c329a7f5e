"""How folders of safetensors store quantised linears, one file for each way."""
