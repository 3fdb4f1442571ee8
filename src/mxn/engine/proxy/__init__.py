"""A replica around a server that is not mxn's own: launched, watched and spoken to in place of the engine."""
