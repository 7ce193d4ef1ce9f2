package ublk

// ZeroCopyFeatures are what a driver needs for bytes to go past the server.
const ZeroCopyFeatures = zeroCopyFeatures

// PretendOld takes the driver for one before Linux 6.4: plain numbers, no features.
func PretendOld(old bool) { pretendOld = old }
