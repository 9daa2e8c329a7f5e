"""The Fisher pass over an original model: text forward, a sampled loss back, layer by layer; and what it leaves."""
