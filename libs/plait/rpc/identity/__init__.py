"""Who is calling, one file for each way of proving it; `plait.rpc.credentials` asks them in order."""
