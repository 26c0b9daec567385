"""Generated from protos/antiphon/rpc/v1 by ``make protos``; not edited by hand."""
