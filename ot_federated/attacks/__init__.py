"""How private it really is: what each party could learn of the other's secret, measured."""
