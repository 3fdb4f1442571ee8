"""Replicas of deployments: started, watched and spoken to. The control plane; imports no torch."""
