"""The controller: who is alive, who answers next, and the OpenAI and FastChat front doors."""
