"""The error feedback of GPTQ, written as LDLQ."""
