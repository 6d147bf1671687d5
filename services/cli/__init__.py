"""The command `heddle`: starts the services, shows what runs, converts models, exports adapters. No torch outside convert."""
