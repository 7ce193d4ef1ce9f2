package ublk

// PretendOld takes the driver for one before Linux 6.4: plain numbers, no features.
func PretendOld(old bool) { pretendOld = old }
