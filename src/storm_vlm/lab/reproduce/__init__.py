"""The paper's whole evidence on the micro world: `run` does it, `tables` counts, `findings` says, `page` shows."""
